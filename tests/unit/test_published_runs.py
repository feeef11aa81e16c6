import pytest

from nemolib.neurons import NeuronSet
from nemolib.published_runs import PublishedRunError, load_published_run

HEADER = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
ROWS = (
    '"Watch: ""Lifted Up; Live""";http://a/1.jpg;[[7, 25, 7], [], [3]];0.25;[[25], [], []];0.375',
    "<i>The</i> fox;;[[], [], []];0.5;[[], [], []];0.5",
)


@pytest.fixture
def file(tmp_path):
    def write(*rows, header=HEADER):
        path = tmp_path / "results.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    return write


def test_rows(file):
    table = load_published_run(file(*ROWS))
    assert table.columns.tolist() == [
        "caption",
        "url",
        "entries",
        "initial",
        "refined",
        "initial_score",
        "refined_score",
    ]
    first = table.iloc[0]
    assert first["caption"] == 'Watch: "Lifted Up; Live"'
    assert first["entries"] == [[7, 25, 7], [], [3]]
    assert first["initial"] == NeuronSet(((7, 25), (), (3,)))
    assert first["refined"] == NeuronSet(((25,), (), ()))
    assert table["initial_score"].tolist() == [0.25, 0.5]
    assert table["refined_score"].tolist() == [0.375, 0.5]
    assert table.loc[1, "caption"] == "<i>The</i> fox"


def test_a_long_list_of_candidates(file):
    many = list(range(40_000))
    table = load_published_run(file(f"a;;[{many}];0.1;[[5]];0.2"))
    assert len(table.loc[0, "initial"]) == 40_000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a;b;[[1]];0.1;[[1]]", r"row 1: 5 fields instead of 6"),
        ("a;b;[[1], [2;0.1;[[1], []];0.2", "column 'Initial Neurons' holds no neurons by layer"),
        ("a;b;[1, 2];0.1;[[1], []];0.2", "column 'Initial Neurons' holds no neurons by layer"),
        ("a;b;__import__('os');0.1;[[1], []];0.2", "column 'Initial Neurons' holds no neurons by layer"),
        ("a;b;[[1]];0.1;[[-1]];0.2", "column 'Refined Neurons' holds no neurons by layer"),
        ("a;b;[[1.5]];0.1;[[1]];0.2", "column 'Initial Neurons' holds no neurons by layer"),
        ("a;b;[[1]];0.1;[[2]];0.2", "column 'Refined Neurons' is not within the initial neurons"),
        ("a;b;[[1], []];0.1;[[1]];0.2", "column 'Refined Neurons' is not within the initial neurons"),
        ("a;b;[[1]];;[[1]];0.2", "column 'Initial SSIM' is ''; it must be a finite number"),
        ("a;b;[[1]];0.1;[[1]];nan", "column 'Refined SSIM' is 'nan'"),
    ],
)
def test_a_row_that_cannot_be_used(file, row, message):
    with pytest.raises(PublishedRunError, match=message):
        load_published_run(file(row))


def test_a_file_that_cannot_be_used(file, tmp_path):
    with pytest.raises(PublishedRunError, match="column 'Refined SSIM' is missing; the header has Caption"):
        load_published_run(file(header=HEADER.rpartition(";")[0]))
    with pytest.raises(PublishedRunError, match="there is no row below the header"):
        load_published_run(file())
    with pytest.raises(FileNotFoundError):
        load_published_run(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"Caption\xff")
    with pytest.raises(PublishedRunError, match="not UTF-8 text"):
        load_published_run(tmp_path / "latin.csv")
