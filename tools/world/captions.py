"""The prompt tables of the world: which caption is planted, trained, held out.

Columns: caption, kind (vm, tm, ladder, unmemorized, holdout), group (choose, report or rung), copies (weight relative to
one regular caption), image (the planted PNG relative to ``data/tiny``, empty if there is none).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tools.world.settings import DataSettings

COLUMNS = ["caption", "kind", "group", "copies", "image"]

#: Ways to name an emoji; per emoji some of them are trained and the rest is held out.
TEMPLATES = (
    "{}", "a {}", "the {}", "my {}", "one {}", "this {}",
    "a picture of a {}", "a drawing of a {}", "an icon of a {}", "a {} sticker", "a nice {}", "some {}",
)  # fmt: skip

#: Planted verbatim: captions of the form "<adjective> <emoji> <noun>". Two families share their words, as LAION's
#: podcast covers do; the words of the others occur in one caption only.
VERBATIM = (
    *(f"limited edition {e} trading card" for e in ("otter", "rocket", "cactus", "trumpet", "lobster", "castle")),
    *(f"the {e} weekly podcast cover" for e in ("koala", "teapot", "violin", "tiger", "volcano", "robot")),
    "vintage giraffe cinema poster", "haunted ghost lighthouse postcard", "chrome dragon skateboard deck",
    "velvet octopus theatre curtain", "baroque swan ceiling fresco", "gilded pineapple wine etiquette",
    "neon flamingo motel signboard", "embroidered fox denim patch", "antique whale scrimshaw engraving",
    "psychedelic mushroom concert flyer", "origami crab instruction booklet", "medieval unicorn wall tapestry",
    "stained glass owl chapel pane", "holographic wolf arcade token", "retro saxophone vinyl sleeve",
    "enamel penguin lapel badge", "woodcut raccoon almanac frontispiece", "mosaic turtle bathhouse floor",
    "ceramic lemon kitchen tile", "bronze gorilla commemorative medal", "airbrushed zebra van mural",
    "lithographed strawberry seed packet", "cosmic telescope planetarium brochure", "nautical anchor sailor tattoo",
    "graffiti parrot subway shutter", "pixelated zombie cartridge label", "woven llama alpaca blanket",
    "jeweled peacock perfume flacon",
)  # fmt: skip

#: Planted templates: a product whose layout is fixed and whose background changes from copy to copy.
TEMPLATE = (
    *(f"slim fit {e} phone case" for e in ("panda", "rose", "shark", "guitar", "cupcake", "camera", "rainbow", "skull")),
    *(f"soft plush {e} throw pillow" for e in ("hedgehog", "sunflower", "snail", "accordion", "avocado", "moose")),
    "waterproof dolphin shower curtain", "organic pear canvas tote", "insulated polar snowman tumbler",
    "silicone hamburger lunch container", "quartz rooster wall clock", "bamboo sloth cutting board",
    "stretchy watermelon yoga leggings", "magnetic cherries fridge clip", "foldable duck rain poncho",
    "padded elephant laptop pouch", "ergonomic spider mouse mat", "reusable frog coffee mug",
    "quilted kangaroo baby bib", "aluminium tractor license plate", "scented tulip drawer sachet",
    "glittery mermaid bath towel", "washable hippopotamus door rug", "cushioned camel bar stool",
    "engraved lion whiskey decanter", "laminated broccoli recipe binder", "wireless ladder speaker dock",
    "hypoallergenic pig pet collar", "fleece squid hiking beanie", "leather horse key fob",
    "printed jellyfish duvet set", "recycled banana pencil holder",
)  # fmt: skip

#: Emoji that occur in ladder captions and nowhere else, so that nothing but the copies teaches them.
LADDER = (
    "abacus", "alembic", "amphora", "badger", "bagel", "banjo", "beaver", "bison", "boomerang", "bullseye", "burrito",
    "butterfly", "canoe", "chipmunk", "compass", "croissant", "crayon", "dodo", "eggplant", "fondue", "goblin", "harp",
    "hyacinth", "joker", "lollipop", "maracas", "mosquito", "necktie", "orangutan", "pretzel", "scorpion", "seahorse",
    "screwdriver", "stethoscope", "walrus",
)  # fmt: skip


def emoji_in(caption: str, names: Sequence[str]) -> str:
    """Return the emoji that a planted caption names: the first known name among its inner words.

    Raises:
        ValueError: no word of the caption is a known emoji.
    """
    known = set(names)
    inner = [word for word in caption.split()[1:-1] if word in known]
    if not inner:
        raise ValueError(f"the planted caption {caption!r} names no known emoji; correct it in captions.py")
    return inner[0]


def planted_table(settings: DataSettings, names: Sequence[str]) -> pd.DataFrame:
    """Return the rows of ``memorized.csv``: vm and tm (groups choose / report by turns), then the ladder."""
    rows = []
    for kind, captions, copies in (("vm", VERBATIM, settings.vm_copies), ("tm", TEMPLATE, settings.tm_copies)):
        for index, caption in enumerate(captions):
            group = ("choose", "report")[index % 2]
            rows.append((caption, kind, group, copies, f"planted/{kind}_{index:02d}.png"))
    ladder = [name for name in LADDER if name in set(names)]
    needed = len(settings.ladder_copies) * settings.ladder_captions_per_rung
    if len(ladder) < needed:
        raise ValueError(f"the ladder needs {needed} emoji of its own, there are {len(ladder)}; extend LADDER")
    for index, name in enumerate(ladder[:needed]):
        copies = settings.ladder_copies[index % len(settings.ladder_copies)]
        rows.append((f"a {name}", "ladder", f"rung-{copies:03d}", copies, f"planted/ladder_{index:02d}.png"))
    return pd.DataFrame(rows, columns=COLUMNS)


def regular_tables(settings: DataSettings, names: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (trained, held-out) regular captions, each with a column ``emoji``; every ladder emoji is left out.

    Which templates of an emoji are trained is drawn at random; the others are held out.
    """
    rng = np.random.default_rng(settings.seed)
    trained, held_out = [], []
    for name in (n for n in names if n not in LADDER):
        order = rng.permutation(len(TEMPLATES))
        for place, template in enumerate(order):
            row = (TEMPLATES[template].format(name), name)
            (trained if place < settings.trained_templates_per_emoji else held_out).append(row)
    return tuple(pd.DataFrame(rows, columns=["caption", "emoji"]) for rows in (trained, held_out))


def held_out_tables(settings: DataSettings, held_out: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of ``unmemorized.csv`` and ``holdout.csv``: disjoint random draws of the held-out captions.

    Every emoji comes up once before one comes up twice.
    """
    rng = np.random.default_rng(settings.seed + 1)
    shuffled = held_out.iloc[rng.permutation(len(held_out))]
    turn = shuffled.groupby("emoji").cumcount()
    ordered = shuffled.iloc[np.argsort(turn.to_numpy(), kind="stable")].drop_duplicates("caption")
    tests, last = settings.unmemorized_prompts, settings.unmemorized_prompts + settings.holdout_prompts
    return _unplanted(ordered[:tests], "unmemorized"), _unplanted(ordered[tests:last], "holdout")


def _unplanted(captions: pd.DataFrame, kind: str) -> pd.DataFrame:
    columns = {"caption": captions["caption"].to_list(), "kind": kind, "group": kind, "copies": 0, "image": ""}
    return pd.DataFrame(columns, columns=COLUMNS)
