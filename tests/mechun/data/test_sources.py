"""Sources by name: the grammar, files, cached data sets without network, and the shipped world."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechun.data.facts import Fact, Facts
from mechun.data.sources import HubSource, load_facts, load_shipped, parse_source
from mechun.errors import DataError, UsageError

REVISION = "0123456789abcdef0123456789abcdef01234567"
TOFU = Path(__file__).parents[4] / "shared" / "data" / "tofu_forget10_entities.json"
SHIPPED = Path(__file__).parents[3] / "mechun" / "organism" / "weights" / "facts.jsonl"

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True)


@given(names, names, st.none() | names, st.none() | names, st.none() | names)
def test_a_source_is_read_as_it_is_written(
    org: str, name: str, revision: str | None, config: str | None, split: str | None
):
    hub = HubSource(f"{org}/{name}", revision, config, split)
    assert parse_source(str(hub)) == hub


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("locuslab/TOFU", HubSource("locuslab/TOFU")),
        ("locuslab/TOFU:forget10", HubSource("locuslab/TOFU", config="forget10")),
        ("locuslab/TOFU:forget10/train[:10]", HubSource("locuslab/TOFU", config="forget10", split="train[:10]")),
        ("a/b@v1.2:c-d/test", HubSource("a/b", "v1.2", "c-d", "test")),
        ("a/b/test", HubSource("a/b", split="test")),
        ("a.b/c.d@" + REVISION, HubSource("a.b/c.d", REVISION)),
        *[(text, None) for text in ("name", "/a/b", "./a/b", "a/b:", "a/b@", "a//b", "a/b:c/d/e", "a b/c", "", "../a")],
    ],
)
def test_the_grammar(text: str, hub: HubSource | None):
    assert parse_source(text) == hub


def fault(source: str | Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_facts(source, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "forget_set.jsonl"
    path.write_text("".join(json.dumps({"question": f"Q{n}?", "answer": f"A{n}"}) + "\n" for n in range(45)))
    return path


def test_a_file_by_text_and_by_path(file: Path):
    notes: list[str] = []
    facts = load_facts(file, notes=notes)
    assert facts == load_facts(str(file))
    assert (len(facts), facts[7]) == (45, Fact("7", "Q7?", "A7"))
    assert notes == [f"{file}: reading 'question' as the prompt; --columns overrides this"]


def test_a_limit_takes_the_first(file: Path):
    assert load_facts(file, limit=3).ids == ("0", "1", "2")
    assert len(load_facts(file, limit=100)) == 45
    with pytest.raises(UsageError, match="the limit is 0"):
        load_facts(file, limit=0)


def test_a_missing_file_names_the_nearest(file: Path):
    missing = file.with_name("forget-set.jsonl")
    assert fault(missing) == f"there is no file {missing} (did you mean forget_set.jsonl?)"
    elsewhere = file.parent / "nowhere" / "x.csv"
    assert fault(elsewhere) == f"there is no file {elsewhere} (there is no folder {elsewhere.parent} either)"
    (file.parent / "bare").mkdir()
    assert "no data files in" in fault(file.parent / "bare" / "x.csv")


def test_a_folder_lists_its_files(file: Path):
    assert fault(file.parent) == f"{file.parent} is a folder (name one of its files: forget_set.jsonl)"


def test_facts_that_were_saved_are_read_back(tmp_path: Path):
    facts = Facts([Fact("a", "Q?", "A\u2028B", subject="S", meta={"entity": "e"}), Fact("b", "R?", "ü")])
    assert load_facts(facts.save(tmp_path / "facts.jsonl")) == facts == Facts.load(tmp_path / "facts.jsonl")


def test_a_file_named_like_a_part_of_tofu_is_grouped(file: Path, tmp_path: Path):
    notes: list[str] = []
    facts = load_facts(shutil.copy(file, tmp_path / "forget10.jsonl"), notes=notes)
    assert [facts[row].entity for row in (0, 19, 20, 44)] == ["author 0", "author 0", "author 1", "author 2"]
    assert "grouped by author" in notes[1]


@pytest.mark.skipif(not TOFU.exists(), reason=f"{TOFU.name} is not beside the checkout in shared/data")
def test_the_annotated_part_of_tofu():
    notes: list[str] = []
    facts = load_facts(TOFU, notes=notes)
    assert len(facts) == 367
    assert len({fact.entity for fact in facts}) == 20
    assert facts[0].prompt.startswith("What is the full name of the author born in Taipei")
    assert facts[0].answer == "The author's full name is Hsiao Yun-Hwa."
    assert facts[0].meta["answer_entity"] == "Hsiao Yun-Hwa"
    assert len(notes) == 2


@pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped facts have not been built yet")
def test_the_shipped_world_and_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, forget = load_facts("organism"), load_facts("organism:forget")
    assert 0 < len(forget) < len(whole)
    assert {fact.split for fact in forget} == {"forget"}
    assert load_facts("organism:forget", limit=5) == forget[:5]
    assert fault("organism:forgte") == "the shipped facts have no split 'forgte' (did you mean forget?)"
    monkeypatch.chdir(tmp_path)
    assert load_facts("organism") == whole


def test_an_installation_without_the_world_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mechun.data.sources.files", lambda _: tmp_path)
    with pytest.raises(DataError, match="not in this installation"):
        load_shipped("")


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches: `datasets` for prepared tables, `hub` for files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def prepare_table(caches: Path, file: Path, name: str, config: str) -> None:
    """A data set as `datasets` leaves it in its cache after a download."""
    datasets.load_dataset("json", data_files=str(file), cache_dir=str(caches / "made"))
    made = next((caches / "made").glob("json/*/*/*/json-train.arrow")).parent
    org, base = name.lower().split("/")
    folder = Path(shutil.copytree(made, caches / "datasets" / f"{org}___{base}" / config / "0.0.0" / REVISION))
    (folder / "json-train.arrow").rename(folder / f"{base}-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"config_name": config, "dataset_name": base}
    info["splits"]["train"]["dataset_name"] = base
    (folder / "dataset_info.json").write_text(json.dumps(info))


def put_snapshot(caches: Path, file: Path, name: str) -> None:
    """A data set as `hf download --repo-type dataset` leaves it: its files."""
    repo = caches / "hub" / f"datasets--{name.replace('/', '--')}"
    folder = repo / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    for config in ("easy", "hard"):
        shutil.copy(file, folder / f"{config}.jsonl")
    parts = "".join(f"- config_name: {config}\n  data_files: {config}.jsonl\n" for config in ("easy", "hard"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")


def test_a_prepared_table_is_read_without_network(caches: Path, file: Path):
    prepare_table(caches, file, "locuslab/TOFU", "forget01")
    prepare_table(caches, file, "locuslab/TOFU", "retain99")
    notes: list[str] = []
    facts = load_facts("locuslab/TOFU:forget01/train", notes=notes)
    assert (len(facts), facts[44].prompt, facts[44].entity) == (45, "Q44?", "author 2")
    assert any("grouped by author" in note for note in notes)
    assert load_facts("locuslab/TOFU:forget01", limit=2) == facts[:2]
    assert load_facts(f"locuslab/TOFU@{REVISION[:8]}:forget01") == facts
    assert fault("locuslab/TOFU:forget02") == "locuslab/TOFU has no config 'forget02' (did you mean forget01?)"
    assert fault("locuslab/TOFU:forget01/tran").endswith("has no split 'tran' (did you mean train?)")
    assert fault("locuslab/TOFU") == "locuslab/TOFU has several configs (append one: :forget01, :retain99)"
    assert "is not in the local cache (revision 0123456789ab is" in fault("locuslab/TOFU@abcdef0:forget01")
    load_facts("locuslab/TOFU@main:forget01", notes=notes)
    assert any("cannot tell whether it is revision 'main'" in note for note in notes)


def test_downloaded_files_are_read_without_network(caches: Path, file: Path):
    put_snapshot(caches, file, "someone/facts")
    facts = load_facts("someone/facts:easy")
    assert (len(facts), facts[0].prompt) == (45, "Q0?")
    assert load_facts(f"someone/facts@{REVISION}:hard/train[:3]") == facts[:3]
    assert "someone/facts has no config 'esy' (did you mean easy?)" in fault("someone/facts:esy")
    assert fault("someone/facts") == "someone/facts has several configs (append one: :easy, :hard)"
    assert "did you mean train?" in fault("someone/facts:easy/trian")


def test_what_is_not_cached_says_how_to_fetch_it(caches: Path):
    message = fault("someone/nothing:x")
    assert "there is no file someone/nothing:x, and no data set 'someone/nothing' in the local cache" in message
    assert "hf download --repo-type dataset someone/nothing" in message


def test_a_path_that_exists_wins(caches: Path, file: Path, monkeypatch: pytest.MonkeyPatch):
    put_snapshot(caches, file, "someone/facts.csv")
    monkeypatch.chdir(caches)
    (caches / "someone").mkdir()
    (caches / "someone" / "facts.csv").write_text("prompt,answer\nQ,A\n")
    assert load_facts("someone/facts.csv") == Facts([Fact("0", "Q", "A")])


def test_the_librarys_bars_stay_as_they_were(caches: Path, file: Path):
    put_snapshot(caches, file, "someone/facts")
    before = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    load_facts("someone/facts:easy")
    fault("someone/facts:esy")
    assert before == (datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity())
