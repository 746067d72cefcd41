"""A finished run as a model repository: card, weights, pictures, and what must never be in it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from checks import slow, trained_module
from hub import Hub, running_hub
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import build_tiny_model

from sdft.config.command import compose
from sdft.errors import UserError
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.run_folder import SUMMARY
from sdft.publish.facts import figures_of, read_facts
from sdft.publish.run import publish
from sdft.training.callbacks.export import Export, described
from sdft.training.receipt import weights_digest
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.words import Words

ROOT = Path(__file__).resolve().parents[2]
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
PARTS = ("unet", "text_encoder", "text_encoder_2")
TUNINGS: dict[str, Any] = {
    "lora": lambda: Adapter(rank=2),
    "dora": lambda: Adapter(rank=2, method="dora", init="kaiming"),
    "loha": lambda: Adapter(rank=2, method="loha"),
    "lora and words": lambda: Adapter(rank=2, parts=PARTS, new_words={"<sks>": "red cat"}),
    "words": lambda: Words({"<sks>": "red cat"}, vectors=2),
    "model": Full,
}
PRIVATE = "/home/alice/wedding"
FIGURES = {"style_gain": 0.62, "adherence": 0.8, "adherence_base": 0.9, "val/eps_mse": 0.1234}


def finished_run(
    folder: Path,
    tuning: str = "lora",
    base: str = SDXL,
    figures: dict[str, Any] | None = None,
    single_file: bool = False,
) -> Path:
    """The folder that a run leaves, of the tiny model, with paths of somebody's machine in its receipt."""
    folder.mkdir(parents=True)
    module = trained_module(build_tiny_model(), TUNINGS[tuning]())
    about = described(SimpleNamespace(objective=module.objective, tuning=module.tuning), "ink", 32)
    written = Export(single_file=single_file).write(module, folder, about)
    config = {
        "run_dir": f"{PRIVATE}/runs/ink",
        "model": {"weights": base},
        "data": {"root": f"{PRIVATE}/pictures", "batch_size": 4},
        "trainer": {"accumulate_grad_batches": 2, "precision": "bf16-mixed"},
        "tuning": {"rank": 2, "parts": ["unet"], "method": tuning if tuning in ("dora", "loha") else "lora"},
        "optimizer": {"_target_": "sdft.optimizers.optimizers.adamw", "lr": 1e-4},
        "logger": {"wandb": {"api_key": "0123456789abcdef"}},
        "objective": {"prediction": "epsilon"},
        "prompts": ["a red <sks>" if "words" in tuning else "a red cat", "a castle: \"night\""],
        "caption": "{caption}",
        "sampler": {"steps": 1, "cfg": 2.0},
        "size": 32,
        "seed": 7,
    }  # fmt: skip
    receipt = {
        "config": config,
        "overrides": [f"data.root={PRIVATE}/pictures"],
        "git": {"commit": "f" * 40, "dirty": False},
        "versions": {"torch": "2.13", "diffusers": "0.42"},
        "data": "d" * 64,
        "base_weights": "b" * 64,
        "images": {
            "training": 24, "held_out": 3, "sizes": {"1024x1024": 14, "832x1216": 10}, "different_captions": 27,
            "words_per_caption": 9,
        },
        "outputs": {},
        "figures": {},
    }  # fmt: skip
    (folder / "receipt.json").write_text(json.dumps(receipt))
    summary = {"name": "ink", "num_steps": 300, **(FIGURES if figures is None else figures)}
    summary["artifacts"] = {name: str(path) for name, path in written.items()}
    (folder / SUMMARY).write_text(json.dumps(summary))
    (folder / "samples").mkdir()
    entries = []
    for number, prompt in enumerate(config["prompts"]):
        noise = np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "samples" / f"{number:02d}.png")
        entries.append({"prompt": prompt, "negative": "grey" * number, "seed": number, "size": [32, 48]})
    (folder / "samples" / "prompts.json").write_text(json.dumps(entries))
    Image.fromarray(noise).save(folder / "before_after.png")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"private")
    return folder


def published(run: Path, *overrides: str) -> tuple[Path, list[str]]:
    said: list[str] = []
    return publish(compose("publish", [f"run={run}", *overrides]), said.append), said


def parsed(folder: Path) -> tuple[dict[str, Any], str]:
    """The YAML and the text of a card."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata()



def chosen(run: Path, kind: str = "lora", recommended: bool = True) -> dict[str, Any]:
    """What choosing leaves in a run folder: here it recommends step 200 at 0.8."""
    if kind == "model":
        shutil.copytree(run / "model", run / "recommended")
    elif kind != "words":
        shutil.copy(run / "lora_kohya.safetensors", run / "recommended.safetensors")
    if "words" in kind:
        shutil.copy(run / "words.safetensors", run / "recommended_words.safetensors")
    noise = np.random.default_rng(5).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "choice.png")
    file = {"model": "recommended", "words": "recommended_words.safetensors"}.get(kind, "recommended.safetensors")
    entry = {"step": 200, "strength": 0.8, "style_gain": {"value": 0.5, "low": 0.4, "high": 0.6}}
    choice = {
        "recommended": file, "step": 200, "strength": 0.8, "reason": "step 200 at strength 0.8: style gain 0.50",
        "candidates": [{**entry, "step": 100}, entry],
    }  # fmt: skip
    if not recommended:
        choice |= {"recommended": None, "step": None, "strength": None, "reason": "none: all have forgotten"}
    (run / "choice.json").write_text(json.dumps(choice))
    return choice


@pytest.mark.parametrize("kind", ["lora", "loha", "lora and words", "words", "model"])
def test_the_recommended_weights_are_published_with_their_own_figures(kind: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", kind)
    final, said = published(run, f"out={tmp_path / 'final'}")
    assert not [line for line in said if "weights=recommended" in line]
    chosen(run, kind)
    _, said = published(run, f"out={tmp_path / 'final'}", "overwrite=true")
    assert [line for line in said if "weights=recommended publishes those" in line]
    folder, said = published(run, f"out={tmp_path / 'chosen'}", "weights=recommended")
    assert not [line for line in said if "weights=recommended" in line]

    def kept(of: Path) -> set[str]:
        return {name for name in files(of) if not name.startswith("images/")}

    assert kept(folder) == kept(final)
    assert [name for name in files(folder) if name.startswith("images/")] == ["images/choice.png"]
    for name in kept(folder):
        if name.endswith(".safetensors"):
            one, two = load_file(final / name), load_file(folder / name)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one), name
    _, text = parsed(folder)
    at = "" if kind in ("words", "model") else ", at strength 0.8"
    assert f"At step 200 of 300{at}, against the base model" in text
    assert "**Style gain 0.50** (0.40 to 0.60)" in text
    assert "0.62" not in text, "the figure of the end of the run"
    assert "these weights are the row 200 x 0.8](images/choice.png)" in text


def test_what_was_not_chosen_is_not_published(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"nothing was chosen yet; python -m sdft\.choosing run="):
        published(run, "weights=recommended")
    chosen(run, recommended=False)
    with pytest.raises(UserError, match=r"none of the checkpoints .* is recommended; keep none: all have forgotten"):
        published(run, "weights=recommended")
    chosen(run)
    (run / "recommended.safetensors").unlink()
    with pytest.raises(UserError, match=r"recommended\.safetensors is missing; python -m sdft\.choosing run="):
        published(run, "weights=recommended")
    with pytest.raises(UserError, match="weights=best: must be final"):
        published(run, "weights=best")
    assert not (run / "published").exists()


def test_a_lora_becomes_a_repository(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    folder, said = published(run, "description=Ink drawings")
    images = ["images/00.png", "images/01.png", "images/before_after.png"]
    assert files(folder) == ["README.md", *images, "ink.safetensors", "pytorch_lora_weights.safetensors"]
    front, text = parsed(folder)
    assert front["base_model"] == SDXL
    assert front["base_model_relation"] == "adapter"
    assert front["license"] == "openrail++"
    assert {"text-to-image", "lora", "diffusers", "stable-diffusion-xl"} <= {*front["tags"]}
    assert [one["output"]["url"] for one in front["widget"]] == images[:2]
    assert front["widget"][1]["parameters"] == {"negative_prompt": "grey"}
    assert "instance_prompt" not in front
    for part in (
        "Ink drawings",
        "24 images, trained at 1024x1024 (14), 832x1216 (10) pixels",
        "| rank | 2 |",
        "| steps | 300 |",
        "| batch size | 8 |",
        "| learning rate | 0.0001 |",
        "**Style gain 0.62.** 0 is the base model",
        "0.80**, the base model 0.90",
        f"SHA-256 of the receipt: `{hashlib.sha256((run / 'receipt.json').read_bytes()).hexdigest()}`",
        "<lora:ink:1>",
        "CreativeML Open RAIL++-M",
        "images/before_after.png",
    ):
        assert part in text, part
    assert said[-1].endswith(f"python -m sdft.publish run={folder} to=USER/NAME")


def test_the_metadata_has_a_thumbnail_and_the_tensors_keep_their_bytes(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    folder, _ = published(run, "author=Alice", "license=mit")
    for name, source in (("ink", "lora_kohya"), ("pytorch_lora_weights", "lora")):
        written, original = folder / f"{name}.safetensors", run / f"{source}.safetensors"
        assert weights_digest(written) == weights_digest(original)
        before, after = metadata(original), metadata(written)
        assert before.items() <= {**after, "modelspec.title": before["modelspec.title"]}.items()
        assert after["modelspec.author"] == "Alice"
        assert after["modelspec.license"] == "mit"
        assert after["modelspec.usage_hint"] == "Prompt: a red cat"
        kind, _, data = after["modelspec.thumbnail"].partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.format, image.size) == ("JPEG", (48, 32))


def python_of(folder: Path, changes: dict[str, str]) -> str:
    """The block of Python of a card, for this machine."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for old, new in {**changes, "torch.float16": "torch.float32", '.to("cuda")': '.to("cpu")'}.items():
        code = code.replace(old, new)
    return code


@pytest.mark.parametrize("tuning", ["lora", slow("dora"), slow("words"), slow("lora and words"), slow("model")])
def test_the_python_of_the_card_draws_an_image(tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = published(finished_run(tmp_path / "run", tuning), "to=me/ink", "to=null")
    write_folder(build_tiny_model(), tmp_path / "base", torch.float32)

    def download(repository: str, name: str) -> str:
        assert repository == "USER/NAME"
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    code = python_of(folder, {SDXL: str(tmp_path / "base"), '"USER/NAME", weight': f'"{folder}", weight',
                              'from_pretrained("USER/NAME"': f'from_pretrained("{folder}"'})  # fmt: skip
    exec(compile(code, "card", "exec"), {})
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora and words", "model"])
def test_other_kinds_of_runs(tuning: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", tuning, single_file=True)
    (run / "model").mkdir(exist_ok=True)
    (run / "model" / "notes.txt").write_text("mine")
    folder, _ = published(run, "to=null")
    front, text = parsed(folder)
    found = files(folder)
    assert "notes.txt" not in found
    if tuning == "model":
        assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "ink.safetensors"} <= {*found}
        assert front["base_model_relation"] == "finetune"
        assert "models/checkpoints" in text
        assert weights_digest(folder / "unet") == weights_digest(run / "model" / "unet")
    else:
        assert {"words.safetensors", "embeddings/_sks_.safetensors", "ink.safetensors"} <= {*found}
        assert front["instance_prompt"] == "<sks>"
        assert "embedding:_sks_" in text


def test_what_diffusers_cannot_load_is_said(tmp_path: Path) -> None:
    folder, _ = published(finished_run(tmp_path / "run", "loha"))
    assert "ink.safetensors" in files(folder)
    assert "diffusers cannot load a LoHa" in (folder / "README.md").read_text()


def test_a_base_from_a_file_is_named_without_its_folder(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", base=f"{PRIVATE}/models/dream.safetensors")
    folder, said = published(run)
    front, text = parsed(folder)
    assert "base_model" not in front
    assert 'from_single_file("dream.safetensors"' in text
    assert any("base=OWNER/NAME" in line for line in said)
    assert any("license" in line for line in said)
    folder, said = published(run, "base=some/dream", "license=mit", "overwrite=true")
    assert parsed(folder)[0]["base_model"] == "some/dream"
    assert len(said) == 2


def test_nothing_private_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the paths and the key of the receipt, nor the environment, nor files beside the weights."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret value")
    run = finished_run(tmp_path / "run")
    (run / ".env").write_text("HF_TOKEN=hf_" + "x" * 30)
    folder, _ = published(run)
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (PRIVATE, "alice", "0123456789abcdef", "hf_xxx", "very secret", str(tmp_path), str(Path.home())):
            assert secret.encode() not in content, (path, secret)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (f"in the manner of {PRIVATE}/pictures", r"README\.md holds the path of data\.root"),
        ("very secret value", r"README\.md holds the value of the environment variable MY_API_KEY"),
        ("hf_" + "aB3" * 10, r"README\.md holds a token of the Hub"),
    ],
)
def test_a_secret_in_a_prompt_stops_it(
    prompt: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "very secret value")
    run = finished_run(tmp_path / "run")
    (run / "samples" / "prompts.json").write_text(json.dumps([{"prompt": prompt, "size": [32, 48]}] * 2))
    with pytest.raises(UserError, match=message):
        published(run)
    assert not (run / "published").exists()


def test_only_what_an_earlier_call_wrote_is_replaced(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    folder, _ = published(run)
    with pytest.raises(UserError, match=r"published: exists already; pass overwrite=true"):
        published(run)
    (folder / "README.md").write_text("edited")
    published(run, "overwrite=true")
    assert (folder / "README.md").read_text() != "edited"
    (folder / "thesis.docx").touch()
    with pytest.raises(UserError, match=r"holds files that are not part of a model .*thesis\.docx"):
        published(run, "overwrite=true")


WRONG = [
    (["to=nonsense"], "is no repository of the Hub; write USER/NAME"),
    (["private=3"], "private=3: must be true or false"),
    (["license=7"], "license=7: must be a text"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong_options_are_refused_first(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        published(tmp_path, *overrides)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no finished run \(no summary\.json\)"):
        published(tmp_path)
    run = finished_run(tmp_path / "run")
    (run / "lora.safetensors").unlink()
    with pytest.raises(UserError, match=r"its lora, lora\.safetensors, is missing"):
        published(run)


def test_figures_are_told_in_words(tmp_path: Path) -> None:
    figures = {
        "identity": 0.7, "recognised": 0.9, "recognised_base": 0.1, "forgetting": 0.05, "win_rate": 0.8,
        "judge_accuracy": 0.9, "style_gain": None, "style_gain_note": "not measured: ...",
    }  # fmt: skip
    lines = figures_of(read_facts(finished_run(tmp_path / "run", figures=figures)))
    text = " ".join(lines)
    for part in ("Identity 0.70", "90% of images**, of the base model's 10%", "80% of prompts", "Other prompts: -0.05"):
        assert part in text
    assert lines[-1] == "Not measured: style gain."


def upload(hub: Hub, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`upload` in a process of its own: the client reads its environment when it is imported."""
    own = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    own |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent / "hf"), **environment}
    code = (
        "import sys; from pathlib import Path; from sdft.publish.hub import upload; from sdft.errors import UserError\n"
        "try: print(upload(Path(sys.argv[1]), 'me/ink', 'private' in sys.argv))\n"
        "except UserError as error: print(error); sys.exit(2)"
    )
    command = [sys.executable, "-c", code, str(folder), *words]
    return subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_hub_gets_the_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    (folder / "images").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# ink\n")
    (folder / "ink.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "images" / "00.png").write_bytes(b"png")
    (tmp_path / "secret.txt").write_text("beside it")
    with running_hub() as hub:
        done = upload(hub, folder, "private", HF_TOKEN="hf_test")
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        assert done.stdout.strip() == f"{hub.address}/me/ink"
        assert (hub.created["organization"], hub.created["name"]) == ("me", "ink")
        assert hub.created.get("private") or hub.created.get("visibility") == "private"  # by the client's version
        assert hub.files == {name: (folder / name).read_bytes() for name in files(folder)}
        assert hub.tokens == {"Bearer hf_test"}


@pytest.mark.parametrize(
    ("path", "status", "message", "token", "expected"),
    [
        ("", 0, "", "", "not logged in to the Hugging Face Hub; the folder .* is ready. Log in with 'hf auth login'"),
        ("/api/repos/create", 403, "no such rights", "hf_test", r"refused the upload \(403: no such rights\)"),
        ("/api/models/me/ink/commit/main", 400, "card is wrong", "hf_test", r"the upload \(400: card is wrong"),
    ],
)
def test_errors_of_the_hub_are_one_sentence(
    path: str, status: int, message: str, token: str, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "README.md").write_text("# ink\n")
    with running_hub() as hub:
        hub.refuse = {path: (status, message)}
        done = upload(hub, folder, **({"HF_TOKEN": token} if token else {}))
    assert done.returncode == 2, done.stdout + done.stderr[-2000:]
    (said,) = done.stdout.strip().splitlines()
    assert re.search(expected, said)
    assert f"python -m sdft.publish run={folder} to=me/ink" in said


@pytest.mark.slow
def test_the_command_writes_the_folder_and_uploads_it(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    own = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with running_hub() as hub:
        own |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        command = [sys.executable, "-m", "sdft.publish", f"run={run}", "to=me/ink"]
        done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        assert f"uploaded: {hub.address}/me/ink" in done.stdout
        assert sorted(hub.files) == files(run / "published")
        assert b'load_lora_weights("me/ink"' in hub.files["README.md"]
