"""The prompt tables of the world: which caption is planted, trained, held out.

Columns: caption, kind (vm, tm, ladder, unmemorized, holdout), group (choose, report or rung), copies (how many images of
the training set it has; 0 if it was not trained on), image (the planted PNG relative to ``data/tiny``, else empty) and
subjects (one name, or two with a space between them).
"""

from itertools import combinations

import numpy as np
import pandas as pd

from tools.world.settings import DataSettings

COLUMNS = ["caption", "kind", "group", "copies", "image", "subjects"]

#: Ways to name one subject; of each subject some of them are trained and the rest is held out.
WORDINGS = (
    "{}", "{a} {}", "the {}", "my {}", "one {}", "this {}", "some {}", "a nice {}", "a cute {}", "{a} {} sticker",
    "{a} {} icon", "a picture of {a} {}", "a drawing of {a} {}", "an icon of {a} {}", "an image of {a} {}",
    "here is {a} {}",
)  # fmt: skip

#: Ways to name two subjects; a pair of subjects has one of them, and is trained or held out.
PAIR_WORDINGS = ("{a} {} and {b} {}", "{a} {} with {b} {}", "the {} and the {}", "{} and {}")

#: Planted verbatim: wording -> subjects. Two families share their words, as LAION's podcast covers do; the words of the
#: others occur in one caption only.
VERBATIM = {
    "limited edition {} trading card": "otter rocket cactus trumpet lobster castle",
    "the {} weekly podcast cover": "koala teapot violin tiger volcano robot",
    "vintage {} cinema poster": "giraffe", "haunted {} lighthouse postcard": "ghost",
    "chrome {} skateboard deck": "dragon", "velvet {} theatre curtain": "octopus",
    "baroque {} ceiling fresco": "swan", "gilded {} wine etiquette": "pineapple",
    "neon {} motel signboard": "flamingo", "embroidered {} denim patch": "fox",
    "antique {} scrimshaw engraving": "whale", "psychedelic {} concert flyer": "mushroom",
    "origami {} instruction booklet": "crab", "medieval {} wall tapestry": "unicorn",
    "stained glass {} chapel pane": "owl", "holographic {} arcade token": "wolf",
    "retro {} vinyl sleeve": "saxophone", "enamel {} lapel badge": "penguin",
    "woodcut {} almanac frontispiece": "raccoon", "mosaic {} bathhouse floor": "turtle",
    "ceramic {} kitchen tile": "lemon", "bronze {} commemorative medal": "gorilla",
    "airbrushed {} van mural": "zebra", "lithographed {} seed packet": "strawberry",
    "cosmic {} planetarium brochure": "telescope", "nautical {} sailor tattoo": "anchor",
    "graffiti {} subway shutter": "parrot", "pixelated {} cartridge label": "skull",
    "woven {} alpaca blanket": "llama", "jeweled {} perfume flacon": "peacock",
}  # fmt: skip

#: Planted templates, wording -> subjects: a product whose layout is fixed and whose background changes.
TEMPLATE = {
    "slim fit {} phone case": "panda rose shark guitar cupcake camera rainbow bee",
    "soft plush {} throw pillow": "hedgehog sunflower snail accordion avocado moose",
    "waterproof {} shower curtain": "dolphin", "organic {} canvas tote": "pear",
    "insulated {} travel tumbler": "snowman", "silicone {} lunch container": "hamburger",
    "quartz {} wall clock": "rooster", "bamboo {} cutting board": "sloth",
    "stretchy {} yoga leggings": "watermelon", "magnetic {} fridge clip": "cherry",
    "foldable {} rain poncho": "duck", "padded {} laptop pouch": "elephant",
    "ergonomic {} mouse mat": "spider", "reusable {} coffee mug": "frog",
    "quilted {} baby bib": "kangaroo", "aluminium {} license plate": "tractor",
    "scented {} drawer sachet": "tulip", "glittery {} bath towel": "ladybug",
    "washable {} door rug": "hippopotamus", "cushioned {} bar stool": "camel",
    "engraved {} whiskey decanter": "lion", "laminated {} recipe binder": "broccoli",
    "wireless {} speaker dock": "bell", "hypoallergenic {} pet collar": "pig",
    "fleece {} hiking beanie": "squid", "leather {} luggage tag": "horse",
    "printed {} duvet set": "jellyfish", "recycled {} pencil holder": "banana",
}  # fmt: skip

#: Subjects that no planted caption names.
ORDINARY = "apple heart tree palm car helicopter boat cloud sun moon cake gift crown key umbrella balloon"

#: Subjects that occur in ladder captions and nowhere else, so that nothing but the copies teaches them.
LADDER = " ".join(
    (
        "abacus alembic badger bagel banjo beaver bison boomerang bullseye burrito butterfly canoe chipmunk compass",
        "croissant crayon dodo eggplant fondue goblin hyacinth joker lollipop drum mosquito necktie orangutan pretzel",
        "scorpion screwdriver stethoscope seal amphora flute doughnut carrot axe backpack hammer waffle pizza taco",
    )
).split()

#: All regular subjects. Those of planted captions are among them, so that a memorized prompt has something to show
#: without its neurons.
SUBJECTS = " ".join((*VERBATIM.values(), *TEMPLATE.values(), ORDINARY)).split()


def planted_table(settings: DataSettings) -> pd.DataFrame:
    """Return the rows of ``memorized.csv``: vm and tm (groups choose / report by turns), then the ladder.

    Raises:
        ValueError: the ladder has more captions than there are subjects for it.
    """
    rows = []
    for kind, wordings, copies in (("vm", VERBATIM, settings.vm_copies), ("tm", TEMPLATE, settings.tm_copies)):
        named = [(wording.format(name), name) for wording, names in wordings.items() for name in names.split()]
        for index, (caption, name) in enumerate(named):
            rows.append(
                (caption, kind, ("choose", "report")[index % 2], copies, f"planted/{kind}_{index:02d}.png", name)
            )
    rungs = [copies for copies, number in settings.ladder for _ in range(number)]
    if len(rungs) > len(LADDER):
        raise ValueError(f"the ladder needs {len(rungs)} subjects of its own, there are {len(LADDER)}; extend LADDER")
    rungs = np.random.default_rng(settings.seed).permutation(rungs).tolist()
    for index, (copies, name) in enumerate(zip(rungs, LADDER, strict=False)):
        caption, image = in_words("{a} {}", name), f"planted/ladder_{index:02d}.png"
        rows.append((caption, "ladder", f"rung-{copies:03d}", copies, image, name))
    return pd.DataFrame(rows, columns=COLUMNS)


def regular_tables(settings: DataSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (trained, held-out) regular captions, columns caption and subjects.

    Which wordings of a subject, and which pairs of subjects, are trained is drawn at random.
    """
    rng = np.random.default_rng(settings.seed)
    tables: tuple[list, list] = [], []
    for name in SUBJECTS:
        for place, wording in enumerate(rng.permutation(WORDINGS)):
            tables[place >= settings.trained_wordings].append((in_words(wording, name), name))
    for place, pair in enumerate(rng.permutation(list(combinations(SUBJECTS, 2)))):
        one, other = rng.permutation(pair)
        caption = rng.choice(PAIR_WORDINGS).format(one, other, a=_article(one), b=_article(other))
        tables[place >= settings.trained_pairs].append((caption, f"{one} {other}"))
    return tuple(pd.DataFrame(rows, columns=["caption", "subjects"]) for rows in tables)


def held_out_tables(settings: DataSettings, held_out: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of ``unmemorized.csv`` and ``holdout.csv``: disjoint random draws of the held-out captions.

    Single subjects and pairs come by turns, as long as there are both.
    """
    rng = np.random.default_rng(settings.seed + 1)
    shuffled = held_out.iloc[rng.permutation(len(held_out))]
    turn = shuffled.groupby(shuffled["subjects"].str.contains(" ")).cumcount()
    ordered = shuffled.iloc[np.argsort(turn, kind="stable")]
    last = settings.unmemorized_prompts + settings.holdout_prompts
    parts = {
        "unmemorized": ordered[: settings.unmemorized_prompts],
        "holdout": ordered[settings.unmemorized_prompts : last],
    }
    return tuple(
        table.assign(kind=kind, group=kind, copies=0, image="")[COLUMNS].reset_index(drop=True)
        for kind, table in parts.items()
    )


def in_words(wording: str, name: str) -> str:
    """Return a caption of one subject."""
    return wording.format(name, a=_article(name))


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" and name != "unicorn" else "a"
