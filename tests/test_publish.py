"""python -m zoo push: the card says what train.json and table.json say. CITATION.cff."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from zoo import files
from zoo.__main__ import main
from zoo.tokenizer import bytes_tokenizer

ROOT = Path(__file__).resolve().parents[1]
META = {
    "stage": "target", "recipe": "paper", "command": "python train.py --data=gsm8k --recipe=paper", "seed": 7,
    "data": "gsm8k", "data_command": "python data/gsm8k/prepare.py --pack", "length": 64, "template": "qwen3",
    "reference": "../reference", "residual": {"weight": "entropy", "t_res": 1.0},
    "sampler": {"rule": "threshold", "threshold": 0.95}, "options": {"init_from": "JetLM/SDAR-1.7B-Chat@abc"},
    "device": "cuda", "dtype": "bfloat16", "torch": "2.13.0", "step": 700, "tokens": 3225600,
    "val_loss": 0.111,
}  # fmt: skip
ROWS = [
    {"label": "SeqD", "rule": "static", "value": 4, "accuracy": 0.6149, "nfe": 4.0, "tokens_per_step": 6.5,
     "correct": [True, False, True]},
    {"label": "RCD (cold)", "rule": "threshold", "value": 0.85, "accuracy": 0.92, "nfe": 6.254,
     "tokens_per_step": 4.157, "correct": [True, True, True]},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, tiny) -> Path:
    """A stage of a run in this project's layout, with the table of the run beside it."""
    folder = tmp_path / "run" / "target"
    files.save(tiny(vocab_size=258, mask_id=257), folder)
    bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    (folder / "train.json").write_text(json.dumps(META))
    (folder.parent / "table.json").write_text(json.dumps({"command": "", "seed": 7, "rows": ROWS}))
    (folder / "state.safetensors").write_bytes(b"AdamW")
    return folder


@pytest.fixture
def api(monkeypatch) -> list[tuple[str, dict]]:
    """What huggingface_hub's HfApi was asked to do. Nothing goes out."""
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options):
            calls.append(("upload_folder", options))
            return SimpleNamespace(commit_url="https://hub/you/name/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return calls


def pushed(capsys, *argv) -> tuple[int, str, str]:
    try:
        main(["push", *map(str, argv)])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_card_says_how_the_model_was_made(folder, api, capsys):
    code, out, _ = pushed(capsys, folder, "you/name", "--license=apache-2.0", "--dry_run")
    path = folder / "README.md"
    assert code == 0 and out.split() == ["card", str(path)] and not api
    card = ModelCard.load(path)  # the hub's own parser
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and "arxiv:2601.22954" in data["tags"] and "base_model" not in data
    lines = [line for line in card.text.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    facts = dict(row for row in rows if len(row) == 2)
    assert facts["data"] == "gsm8k" and facts["recipe"] == "paper" and facts["reference"] == "../reference"
    assert facts["residual"] == "weight=entropy, t_res=1.0"
    assert facts["training"] == "700 steps, 3,225,600 tokens"
    assert ["SeqD", "static, steps=4", "61.5%", "4.00", "6.50"] in rows
    assert ["RCD (cold)", "threshold 0.85", "92.0%", "6.25", "4.16"] in rows and "first 3 test" in card.text
    assert f"```\n{META['data_command']}\n{META['command']}\n```" in card.text
    assert "python sample.py --model=you/name" in card.text


def test_push_uploads_the_card_and_keeps_one_that_was_edited(folder, api, capsys):
    code, out, _ = pushed(capsys, folder, "you/name", "--license=mit")
    assert code == 0 and "uploaded  https://hub/you/name/commit/1" in out
    (_, created), (_, upload) = api
    assert (created["repo_id"], created["private"]) == ("you/name", True)
    assert upload["folder_path"] == folder and "README.md" in upload["allow_patterns"]
    assert "state*" in upload["ignore_patterns"]
    (folder / "README.md").write_text("mine")
    code, out, _ = pushed(capsys, folder, "you/name", "--public")
    assert code == 0 and "as it was" in out and (folder / "README.md").read_text() == "mine"
    assert api[2][1]["private"] is False


def test_a_converted_model_names_its_base(folder, api, capsys):
    """Its config.json is its family's. Without a table the card says so."""
    (folder.parent / "table.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "sdar"}))
    pushed(capsys, folder, "you/name", "--license=apache-2.0", "--dry_run")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "JetLM/SDAR-1.7B-Chat" and "No table was made" in card.text


@pytest.mark.parametrize("argv, says", [
    ([], "a card needs a licence: give --license=NAME"), (["--license=MIT License"], "license='MIT License'"),
    (["--licence=mit"], "unrecognized"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(folder, api, capsys, argv, says):
    code, out, err = pushed(capsys, folder, "you/name", *argv)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not api and not (folder / "README.md").exists()


def test_a_folder_without_a_record(folder, api, capsys):
    (folder / "train.json").unlink()
    code, _, err = pushed(capsys, folder, "you/name", "--license=mit")
    assert code == 2 and "has no train.json" in err and err.count("\n") == 1 and not api
    code, _, err = pushed(capsys, folder / "nothing", "you/name")
    assert code == 2 and "no folder" in err


def test_a_model_that_no_command_here_reads_is_not_pushed(folder, api, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "fsdfm"}))
    code, _, err = pushed(capsys, folder, "you/name", "--license=mit")
    assert code == 2 and "is a model of zoo/rivals/fsdfm" in err and err.count("\n") == 1 and not api


def test_the_shipped_model_has_a_card(api, capsys, tmp_path):
    for name in ("config.json", "train.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "zoo/sudoku/target" / name).read_bytes())
    assert pushed(capsys, tmp_path, "you/name", "--license=mit", "--dry_run")[0] == 0
    assert "weight=entropy, fixed=0.3" in (tmp_path / "README.md").read_text()


def test_a_model_of_an_earlier_version_has_a_card(api, capsys, tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "zoo/sudoku/target" / name).read_bytes())
    meta = json.loads((ROOT / "zoo/sudoku/target/train.json").read_text())
    then = {"weight": "fixed", "fixed": 0.5, "t_res": 1.0, "temper_delta": False, "residual_top_k": 0}
    later = "budget", "grow", "adam", "weighting", "lora", "shard", "residual_epsilon"
    options = {k: v for k, v in meta["options"].items() if k not in later}
    (tmp_path / "train.json").write_text(json.dumps(meta | {"residual": then, "options": options}))
    assert pushed(capsys, tmp_path, "you/name", "--license=mit", "--dry_run")[0] == 0
    assert "weight=fixed, fixed=0.5" in (tmp_path / "README.md").read_text()


def test_the_citation_is_of_this_project_and_of_the_paper():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project, readme = (ROOT / "pyproject.toml").read_text(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()  # what the format requires
    assert f'version = "{cff["version"]}"' in project and f'text = "{cff["license"]}"' in project
    (holder,) = [line for line in (ROOT / "LICENSE").read_text().splitlines() if "Copyright" in line]
    assert holder.endswith(cff["authors"][0]["name"])
    (paper,) = cff["references"]
    assert paper["url"].removeprefix("https://") in readme.replace("(https://", "").replace(")", "")
    assert paper["doi"].endswith(paper["url"].rsplit("/", 1)[1])
    assert len(paper["authors"]) == 13 and paper["authors"][0]["family-names"] == "Hu"
