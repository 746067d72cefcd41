"""Comparing: adapters are applied and removed without a trace, and what users write is escaped."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from warm import WarmPython

from sdft.config.command import ConfigError, build, check, compose
from sdft.errors import UserError
from sdft.evaluation.subject_loader import SubjectLoader, with_lora, with_words
from sdft.evaluation.subjects import AdapterFiles, Subject, read_subjects
from sdft.formats.adapter import words_of, write_lora, write_words
from sdft.models.load import pretrained
from sdft.models.sdxl import SDXL
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.tuning.adapter import Adapter

ROOT = Path(__file__).resolve().parents[2]
WORD = "стиль_Техноманта"
PROMPT = f"a photo of a cat, {WORD}"
SAMPLER = Sampler("euler", steps=2, cfg=3.0)
ALERT = "<script>alert(1)</script>"


def picture(model: SDXL) -> np.ndarray:
    return generate(model, [PROMPT], [0], SAMPLER, (32, 32))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A run folder with a LoRA on all parts and a new word, and what its model drew."""
    folder = tmp_path_factory.mktemp("run")
    model = pretrained("nano")
    Adapter(rank=2, parts=("unet", "text_encoder", "text_encoder_2"), new_words={WORD: "a cat"}).attach(model)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("rows_ND"):
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    write_lora(model, folder / "lora.safetensors")
    write_words(words_of(model, [WORD]), folder / "words.safetensors")
    # As a run elsewhere left it: only the names of the files still hold.
    artifacts = {"lora": "/elsewhere/lora.safetensors", "words": "/elsewhere/words.safetensors"}
    (folder / "summary.json").write_text(json.dumps({"artifacts": artifacts}))
    return folder, picture(model)


@pytest.fixture(scope="module")
def base() -> SDXL:
    return pretrained("nano").eval()


@pytest.fixture
def models(base: SDXL) -> SubjectLoader:
    models = SubjectLoader(lambda weights="nano": pretrained(weights), "nano", torch.device("cpu"))
    models._base = base
    return models


def traces(model: SDXL) -> Iterator[object]:
    """Everything that a subject could leave behind."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.item()
    yield [(name, type(module)) for name, module in model.named_modules()]
    yield [len(tokenizer) for tokenizer, _ in model.context_encoders]
    yield [getattr(part, "peft_config", None) for part in (model.unet, model.text_encoder, model.text_encoder_2)]


def test_a_run_draws_what_its_model_drew_and_leaves_no_trace(run, models: SubjectLoader) -> None:
    folder, expected = run
    before, plain = list(traces(models.base)), picture(models.base)
    (subject,) = read_subjects({"mine": str(folder)})
    assert subject.adapters == (AdapterFiles(folder / "lora.safetensors", folder / "words.safetensors"),)
    assert (subject.name, subject.source, subject.weights) == ("mine", str(folder), None)
    with models.open(subject) as model:
        drawn = picture(model)
    # The factors are stored in fp16, so a byte may differ here and there.
    assert np.abs(drawn.astype(int) - expected).mean() < 0.5
    assert np.abs(drawn.astype(int) - plain).mean() > 2
    assert list(traces(models.base)) == before
    assert np.array_equal(picture(models.base), plain)


def test_the_new_words_matter_by_themselves(run: tuple[Path, np.ndarray], base: SDXL) -> None:
    before = list(traces(base))
    with with_words(base, run[0] / "words.safetensors"):
        assert len(base.tokenizer(WORD, add_special_tokens=False).input_ids) == 1
        assert base.word_rows["clip_g"].shape == (1, 80)
    assert len(base.tokenizer(WORD, add_special_tokens=False).input_ids) > 1
    assert list(traces(base)) == before


def test_a_lora_file_is_applied_to_the_base(run: tuple[Path, np.ndarray], models: SubjectLoader) -> None:
    (subject,) = read_subjects({"file": str(run[0] / "lora.safetensors")})
    assert (subject.kind, subject.adapters) == ("LoRA", (AdapterFiles(run[0] / "lora.safetensors"),))
    with models.open(subject) as model:
        assert model is models.base
        assert any("lora_" in name for name, _ in model.text_encoder_2.named_parameters())


def test_the_base_is_not_loaded_twice_and_others_are(models: SubjectLoader, tmp_path: Path) -> None:
    with models.open(Subject("base", "nano", weights="nano")) as model:
        assert model is models.base
    with (
        pytest.raises(UserError, match=r"^subjects\.other=.*has no model_index\.json"),
        models.open(Subject("other", "there", weights=str(tmp_path))),
    ):
        pass


def test_a_lora_that_does_not_fit_is_refused_without_a_trace(base: SDXL, tmp_path: Path) -> None:
    before = list(traces(base))
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = {f"{layer}.lora_A.weight": torch.ones(2, 640), f"{layer}.lora_B.weight": torch.ones(640, 2)}
    absent = {f"unet.nowhere.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    for tensors in (wide, absent):
        save_file(tensors, tmp_path / "lora.safetensors")
        with (
            pytest.raises(UserError, match=r"^subjects\.mine=x: "),
            with_lora(base, tmp_path / "lora.safetensors", "subjects.mine=x"),
        ):
            pass
        assert list(traces(base)) == before


def test_words_that_do_not_fit_are_refused_without_a_trace(base: SDXL, tmp_path: Path) -> None:
    before = list(traces(base))
    path = tmp_path / "words.safetensors"
    for widths, words in (((5, 6), "neu"), ((48, 80), "neu\nneu"), ((48, 80), "cat"), ((48, 80), "")):
        tensors = {name: torch.ones(1, width) for name, width in zip(("clip_l", "clip_g"), widths, strict=True)}
        save_file(tensors, path, metadata={"words": words})
        with pytest.raises(UserError, match=r"^subjects\.mine=x: "), with_words(base, path, "subjects.mine=x"):
            pass
        assert list(traces(base)) == before


def test_wrong_subjects_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae_run").mkdir()
    (tmp_path / "vae_run" / "model").mkdir()
    (tmp_path / "vae_run" / "summary.json").write_text('{"artifacts": {"model": "model"}}')
    (tmp_path / "lost_run").mkdir()
    (tmp_path / "lost_run" / "summary.json").write_text('{"artifacts": {"lora": "lora.safetensors"}}')
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "last.ckpt").write_bytes(b"")
    for source, reason in [
        ("empty", "neither a finished run"),
        ("vae_run", "neither a LoRA nor a whole SDXL model"),
        ("lost_run", "the run's lora, .*, is missing"),
        ("other.safetensors", "neither an SDXL checkpoint nor a LoRA"),
        ("broken.safetensors", "truncated or not a safetensors file"),
        ("last.ckpt", "is no .safetensors file; of a run, pass its folder"),
        ("nowhere.safetensors", "there is no such file or folder"),
    ]:
        with pytest.raises(UserError, match=rf"^subjects\.mine={tmp_path / source}: .*{reason}"):
            read_subjects({"base": "nano", "mine": str(tmp_path / source)})
    monkeypatch.chdir(tmp_path)
    for source in ("empty/typo", "owner/lora.safetensors"):
        with pytest.raises(UserError, match=rf"^subjects\.mine={source}: there is no such file or folder"):
            read_subjects({"mine": source})
    for name in ("../up", "", "a/b", ".hidden"):
        with pytest.raises(UserError, match="use letters, digits"):
            read_subjects({name: "nano"})
    with pytest.raises(UserError, match="subjects is empty"):
        read_subjects({})
    assert read_subjects({"hub": "stabilityai/stable-diffusion-xl-base-1.0"})[0].kind == "model"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["subjects={base: 3}"], r"subjects\.base=3: must be a valid string"),
        (["subjects={base: nano}", "axes.steps=[0]"], "greater than or equal to 1"),
        (["subjects={base: nano}", "compete=[scal]"], "did you mean 'scale'"),
        (["subjects={base: nano}", "metrics=[defalt]"], "did you mean 'default'"),
        (["subjects={base: nano}", "seeds=0"], "seeds=0: must be greater than or equal to 1"),
        (["subjects={base: nano}", "prompts=[]"], "prompts=.*at least 1"),
        (["subjects={base: nano}", "prompt=[a]"], "did you mean 'prompts'"),
        (["subjects={base: nano}", "sampler=eulr"], "did you mean 'euler'"),
    ],
)
def test_the_config_refuses(words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(compose("eval", words))


def test_a_sampler_of_an_axis_is_looked_up_before_anything_loads() -> None:
    cfg = compose("eval", ["subjects={base: nano}", "axes.sampler=[euler, eulr]"])
    with pytest.raises(UserError, match=r"axes\.sampler=eulr: is no sampler.* did you mean 'euler'"):
        build(cfg.axes)


def test_the_command_compares_and_escapes_what_users_wrote(
    run: tuple[Path, np.ndarray], python: WarmPython, tmp_path: Path
) -> None:
    words = [
        f"subjects={{base: nano, mine: '{run[0]}'}}",
        f'prompts=["a photo of a cat", "{ALERT}"]',
        "sampler.steps=1",
        "size=32",
        f"run_dir={tmp_path / 'out'}",
    ]
    done = python.complete(["eval.py", *words], ROOT)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    lines = list(csv.DictReader((out / "results.csv").open(encoding="utf-8", newline="")))
    assert [(line["subject"], line["prompt"]) for line in lines] == [
        (name, prompt) for name in ("base", "mine") for prompt in ("a photo of a cat", ALERT)
    ]
    assert {"subject", "prompt", "seed", "sampler", "cfg", "steps", "path", "adherence", "sharpness"} <= set(lines[0])
    assert all(-1 <= float(line["adherence"]) <= 1 for line in lines)
    assert all(Image.open(out / line["path"]).size == (32, 32) for line in lines)
    assert Image.open(out / "grid.png").width > 2 * 128
    assert ALERT not in (out / "report.html").read_text(encoding="utf-8")


def test_a_sweep_becomes_one_comparison(
    run: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import sdft.evaluation.__main__ as command

    for number, rank in enumerate((4, 8, 16)):
        job = tmp_path / "sweep" / str(number)
        (job / ".hydra").mkdir(parents=True)
        (job / ".hydra" / "overrides.yaml").write_text(f"- experiment=dreamy_style\n- rank={rank}\n")
        if rank == 16:
            continue  # did not finish
        (job / "lora.safetensors").write_bytes((run[0] / "lora.safetensors").read_bytes())
        summary = {"artifacts": {"lora": "lora.safetensors"}, "style_gain": rank / 10, "train_seconds": 60}
        (job / "summary.json").write_text(json.dumps(summary))
    words = ["prompts=[a photo of a cat]", "sampler.steps=1", "size=32", f"run_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["eval.py", f"sweep={tmp_path / 'sweep'}", *words])
    command.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(s["name"], s["varied"]) for s in results["subjects"]] == [
        ("base", {}), ("rank 4", {"rank": 4}), ("rank 8", {"rank": 8})
    ]  # fmt: skip
    assert results["subjects"][1]["cost"]["seconds"] == 60
    assert results["figures"]["rank 8"]["style_gain"]["value"] == 0.8
    # Both jobs have the same LoRA: one picture for both.
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert f"left out: {tmp_path / 'sweep' / '2'} did not finish" in printed
    assert "cannot show a difference in prompt adherence" in printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "say what to compare"),
        (["subjects={base: nano}", "reference=nowhere"], "reference=nowhere: no such folder"),
        (["subjects={base: nano}", "prompts=nowhere.txt"], "prompts=nowhere.txt: cannot be read"),
        (["sweep=nowhere"], "sweep=nowhere: no such folder"),
        (["subjects={base: nano}", "size=30"], "both sides must be multiples of"),
    ],
)
def test_wrong_commands_have_a_message_of_one_sentence(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import sdft.evaluation.__main__ as command

    monkeypatch.setattr(sys, "argv", ["eval.py", *words, f"run_dir={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert reason in message
