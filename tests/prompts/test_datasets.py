"""`load_prompts`: shipped lists by their counts, files by their rows, the Hub by what is asked of it."""

import json
from importlib import resources

import datasets
import pytest

from dpok_trl import load_prompts
from dpok_trl.demo.scenes import parse_prompt
from dpok_trl.demo.world import TASKS
from dpok_trl.prompts.datasets import HUB_PROMPTS, shipped_lists


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What the datasets library reads from files it also writes to its cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pairs(dataset):
    return list(zip(dataset["prompt"], dataset["category"], strict=True))


# --- shipped lists ----------------------------------------------------------------------------------------------------

COUNTS = {
    "animals": 45,
    "animals-activities": 135,
    "demo": 4,
    "demo-unseen": 12,
    "dpok": 4,
    "dpok-test": 8,
    "dpok-unseen": 4,
}


def test_all_lists_load_and_have_their_count():
    assert {name: len(load_prompts(name)) for name in shipped_lists()} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_no_prompt_comes_twice_and_the_list_says_its_source(name):
    assert len(set(load_prompts(name)["prompt"])) == COUNTS[name]
    content = json.loads((resources.files("dpok_trl.prompts") / "lists" / f"{name}.json").read_text("utf-8"))
    assert set(content) == {"source", "prompts"} and len(content["source"]) > 30


def test_the_four_prompts_of_the_paper_and_their_tasks():
    dpok = load_prompts("dpok")
    assert pairs(dpok) == [
        ("A green colored rabbit.", "color"),
        ("Four wolves in the park.", "count"),
        ("A dog and a cat.", "composition"),
        ("A dog on the moon.", "location"),
    ]
    unseen = load_prompts("dpok-unseen")
    assert list(unseen["seen_prompt"]) == list(dpok["prompt"])
    assert list(unseen["category"]) == list(dpok["category"])
    assert not set(unseen["prompt"]) & set(dpok["prompt"])


def test_animals_with_activities_are_all_combinations_with_their_article():
    animals = list(load_prompts("animals")["prompt"])
    activities = load_prompts("animals-activities")
    vowel = {True: "an", False: "a"}
    assert set(pairs(activities)) == {
        (f"{vowel[animal[0] in 'aeiou']} {animal} {activity}", activity)
        for animal in animals
        for activity in ("riding a bike", "playing chess", "washing dishes")
    }
    assert "an ant playing chess" in activities["prompt"] and "a dolphin riding a bike" in activities["prompt"]


def test_the_demo_lists_are_what_the_demo_world_can_say():
    assert pairs(load_prompts("demo")) == [(prompt, category) for category, prompt in TASKS.items()]
    abilities = {"single": "color", "count": "count", "pair": "composition", "relation": "location"}
    for row in load_prompts("demo-unseen"):
        scene, seen = parse_prompt(row["prompt"]), parse_prompt(row["seen_prompt"])
        assert abilities[scene.category] == row["category"]
        assert row["seen_prompt"] == TASKS[row["category"]] and row["prompt"] != row["seen_prompt"]
        opposite = {"above": "below", "below": "above", None: None}
        mirrored = (scene.things[::-1], opposite[scene.relation])
        assert (mirrored == (seen.things, seen.relation)) == (row["kind"] == "paraphrase")
        assert scene != seen


def test_lists_have_no_splits():
    with pytest.raises(ValueError, match="split = 'train', but the shipped list 'dpok' has no splits"):
        load_prompts("dpok", split="train")


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_categories_and_limit():
    assert load_prompts("dpok-test", category="composition")["prompt"][:] == ["A dog and a cat.", "A cat and a dog."]
    both = load_prompts("dpok-test", category=["color", "composition"])
    assert list(both["category"]) == ["composition"] * 2 + ["color"] * 3  # in the order of the list
    assert load_prompts("dpok-test", category="color", limit=2)["prompt"][:] == [
        "A blue colored rabbit.",
        "A red colored rabbit.",
    ]
    assert len(load_prompts("dpok", limit=99)) == 4
    with pytest.raises(ValueError, match="limit = 0, but it must be at least 1"):
        load_prompts("dpok", limit=0)


def test_a_category_that_is_not_there():
    there = r"\['color', 'composition', 'count', 'location'\]"
    with pytest.raises(ValueError, match=rf"category = \['colour'\], but dpok has the categories {there}"):
        load_prompts("dpok", category="colour")
    with pytest.raises(ValueError, match=rf"category = \[\], but dpok has the categories {there}"):
        load_prompts("dpok", category=[])
    with pytest.raises(ValueError, match=r"but animals has no categories; its columns are \['prompt'\]"):
        load_prompts("animals", category="cat")


# --- files ------------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "a cat", "category": "one", "weight": 1.0},
    {"prompt": 'two "quoted", dogs', "category": "two", "weight": 0.5},
    {"prompt": "trois élans", "category": "one", "weight": 2.0},
]


@pytest.fixture
def file(tmp_path):
    """Writes ROWS (or others) as a file of that ending."""

    def write(ending, rows=ROWS, name="prompts"):
        path, table = tmp_path / f"{name}{ending}", datasets.Dataset.from_list(rows)
        if ending in (".csv", ".tsv"):
            table.to_csv(path, sep="\t" if ending == ".tsv" else ",", index=False)
        elif ending == ".parquet":
            table.to_parquet(path)
        elif ending == ".txt":
            path.write_text("".join(f"{row['prompt']}\n" for row in rows), encoding="utf-8")
        elif ending == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_a_file_with_columns(ending, file):
    loaded = load_prompts(file(ending))
    assert [{name: row[name] for name in ROWS[0]} for row in loaded] == ROWS
    assert set(loaded.column_names) == set(ROWS[0])
    assert load_prompts(str(file(ending)), category="one", limit=1)["prompt"][:] == ["a cat"]


def test_a_text_file_is_a_prompt_per_line(file):
    path = file(".txt", [*ROWS, {"prompt": "   "}, {"prompt": ""}, {"prompt": "the last"}])
    loaded = load_prompts(path)
    assert loaded.to_dict() == {"prompt": ["a cat", 'two "quoted", dogs', "trois élans", "the last"]}


def test_a_folder_of_files(file, tmp_path):
    file(".jsonl", ROWS[:2], "first")
    file(".jsonl", ROWS[2:], "second")
    assert sorted(load_prompts(tmp_path)["prompt"]) == sorted(row["prompt"] for row in ROWS)


def test_a_folder_with_splits(file, tmp_path):
    file(".jsonl", ROWS[:2], "train")
    file(".jsonl", ROWS[2:], "test")
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]: choose one, e.g. split='test'"):
        load_prompts(tmp_path)
    assert load_prompts(tmp_path, split="test")["prompt"][:] == ["trois élans"]
    assert load_prompts(tmp_path, split="train[:1]")["prompt"][:] == ["a cat"]


def test_other_columns(file):
    rows = [{"caption": "a cat", "kind": " one "}, {"caption": "a dog", "kind": None}]
    loaded = load_prompts(file(".jsonl", rows), prompt_column="caption", category_column="kind")
    assert loaded.to_list() == [{"prompt": "a cat", "category": "one"}, {"prompt": "a dog", "category": None}]
    with pytest.raises(
        ValueError, match=r"no column 'prompt'; its columns are \['caption', 'kind'\]. Name one as prompt_column"
    ):
        load_prompts(file(".jsonl", rows))
    with pytest.raises(ValueError, match="no column 'category'; .* Name one as category_column"):
        load_prompts(file(".jsonl", rows), prompt_column="caption", category_column="category")
    taken = [{"prompt": "a", "caption": "b"}]
    with pytest.raises(ValueError, match="the column 'caption' cannot become 'prompt': there is another"):
        load_prompts(file(".jsonl", taken), prompt_column="caption")


def test_prompts_that_are_none(file):
    with pytest.raises(TypeError, match="row 1 of the column 'prompt' of .* it is None of type NoneType"):
        load_prompts(file(".jsonl", [{"prompt": "a"}, {"prompt": None}]))
    with pytest.raises(TypeError, match=r"row 0 of the column 'prompt' of .* it is 5 of type int"):
        load_prompts(file(".jsonl", [{"prompt": 5}]))
    with pytest.raises(TypeError, match=r"row 1 .* or a list that begins with one; it is \[\] of type list"):
        load_prompts(file(".jsonl", [{"prompt": ["a", "b"]}, {"prompt": []}]))
    with pytest.raises(ValueError, match="is empty: there is no prompt in it"):
        load_prompts(file(".txt", [{"prompt": " "}, {"prompt": ""}]))


def test_names_that_are_unknown(file, tmp_path):
    with pytest.raises(ValueError) as error:
        load_prompts("drawbnch")
    assert "'drawbnch' is no list of prompts, no file and no folder. Did you mean 'drawbench'?" in str(error.value)
    assert all(name in str(error.value) for name in [*COUNTS, *HUB_PROMPTS])
    with pytest.raises(ValueError, match="is no list of prompts, no file and no folder. Lists:"):
        load_prompts("xyzzy")
    for absent in ("prompts/absent.txt", "./absent", str(tmp_path / "absent.csv")):
        with pytest.raises(ValueError, match="no file and no folder"):
            load_prompts(absent)  # and the Hub is not asked
    (tmp_path / "prompts.md").write_text("a cat")
    with pytest.raises(ValueError, match=r"ends in '.md'; prompts are read from .csv, .tsv, .json"):
        load_prompts(tmp_path / "prompts.md")


# --- the Hub ----------------------------------------------------------------------------------------------------------

# Rows in the form that the data sets have on the Hub (docs/prompts.md says how far that was verified).
ON_THE_HUB = {
    "drawbench": [{"Prompts": "A red colored car.", "Category": "Colors"}, {"Prompts": "A pear.", "Category": "Gary Marcus et al. "}],
    "parti-prompts": [{"Prompt": "a horse", "Category": "Animals", "Challenge": "Basic", "Note": None}],
    "coco": [{"captions": ["A pear.", "Fruit."], "image_id": 7}, {"captions": ["Two bears."], "image_id": 8}],
    "cub": [{"text": "this bird is red.\nit has a beak.\n", "label": 3}],
}  # fmt: skip
EXPECTED = {
    "drawbench": [{"prompt": "A red colored car.", "category": "Colors"}, {"prompt": "A pear.", "category": "Gary Marcus et al."}],
    "parti-prompts": [{"Challenge": "Basic", "Note": None, "prompt": "a horse", "category": "Animals"}],
    "coco": [{"image_id": 7, "prompt": "A pear."}, {"image_id": 8, "prompt": "Two bears."}],
    "cub": [{"label": 3, "prompt": "this bird is red."}],
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """Stands for `datasets.load_dataset`: answers with a split, or all of them, and remembers what was asked."""
    asked = []

    def serve(*rows_of_splits):
        tables = {name: datasets.Dataset.from_list(rows) for name, rows in rows_of_splits}

        def load(path, split=None, **options):
            asked.append((path, split, options))
            return tables if split is None else tables[split]

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return serve


@pytest.mark.parametrize("name", HUB_PROMPTS)
def test_benchmarks_of_the_hub(name, hub):
    known = HUB_PROMPTS[name]
    asked = hub((known.split, ON_THE_HUB[name]), ("other", ON_THE_HUB[name][:1]))
    assert load_prompts(name).to_list() == EXPECTED[name]
    assert load_prompts(name, split="other").to_list() == EXPECTED[name][:1]
    assert asked == [(known.repo, known.split, {}), (known.repo, "other", {})]


def test_any_dataset_of_the_hub(hub):
    asked = hub(("train", [{"prompt": "a cat", "n": 1}]))
    assert load_prompts("me/mine").to_list() == [{"prompt": "a cat", "n": 1}]
    assert asked == [("me/mine", None, {})]


def test_classes_become_their_names(hub, monkeypatch):
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "category": datasets.ClassLabel(names=["red", "blue"])}
    )
    table = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "category": [1, 0, None]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"test": table})
    loaded = load_prompts("me/mine")
    assert list(loaded["category"]) == ["blue", "red", None]
    assert load_prompts("me/mine", category="red")["prompt"][:] == ["b"]
