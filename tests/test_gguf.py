"""Models and adapters in llama.cpp's format: read, written, and compared with what llama.cpp itself computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="needs hetlora[gguf]")

from hetlora.cli import main
from hetlora.core.adapter import LoraPair
from hetlora.errors import ModelError
from hetlora.model import gguf_base
from hetlora.model.gguf_adapter import names_of, read_gguf_adapter, write_gguf_adapter
from hetlora.model.gguf_base import SPLITS, convert_gguf
from hetlora.model.gguf_names import ARCHITECTURES, GgufNames
from hetlora.model.initial_adapter import import_adapter
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.model.peft_files import export_adapter
from llama_cpp import LlamaCpp, write_gguf_model
from proofs.small_run import write_rows
from small_federations import phones

pytestmark = pytest.mark.run

TEXTS = (
    "In 1984 there were 12345 men, weren't there?  Two  spaces, and\n\n\ta tab.",
    "def f(x):\n    return x[0] + 3.14159  # it's π ≈ 3\r\n",
    "Größe, naïve, 日本語, emoji 🙂🙂, can't WON'T I'll",
    "   leading, trailing   \n \n",
    "a zyzzyva of 1984",
)


def write_model(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    """Write a small random model with a byte-level tokenizer that has learned to merge on Python's own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEXTS, *["1984 12345 3.14159 "] * 9, Path(shutil.__file__).read_text("utf8")], trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    fast.save_pretrained(folder)
    # A word that no merge leads to.
    saved = json.loads((folder / "tokenizer.json").read_text("utf8"))
    saved["model"]["vocab"]["\u0120zyzzyva"] = len(fast)
    (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf8")
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(fast) + 1, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128 if kind == "qwen3" else 16,
            "max_position_embeddings": 256,
            "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        } | settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A folder of transformers and a GGUF file of the same model, by architecture."""
    made = {}
    for kind in ARCHITECTURES:
        folder = write_model(tmp_path_factory.mktemp(kind) / "own", kind)
        file = folder.parent / f"{kind}.gguf"
        write_gguf_model(folder, file, pre="gpt-2" if kind == "llama" else "qwen2")
        made[kind] = folder, file
    return made


def random_adapter(model: LoraModel, ranks: dict[str, int] | int) -> dict[str, LoraPair]:
    """Return an adapter of this rank, or of these ranks by the last part of a module's name."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for path, (out, into) in model.shapes.items():
        rank = ranks if isinstance(ranks, int) else ranks[path.rpartition(".")[2]]
        made[path] = LoraPair(
            torch.randn(rank, into, generator=generator) / into**0.5,
            torch.randn(out, rank, generator=generator) / rank**0.5,
        )
    return made


def log_probabilities(base: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return base(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


# In ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_file_becomes_the_base_that_it_was_made_of(
    kind: str, models: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, file = models[kind]
    assert main(["base", str(file), str(tmp_path / "made"), "--dtype", "float32"]) == 0
    assert "million parameters in float32, stored as F32" in capsys.readouterr().out
    own, made = (load_base(str(place)).state_dict() for place in (folder, tmp_path / "made"))
    assert own.keys() == made.keys()
    assert [name for name in own if not torch.equal(own[name], made[name])] == []
    tokenizers = [load_tokenizer(str(place)) for place in (folder, tmp_path / "made")]
    for text in TEXTS if kind == "llama" else ():  # transformers gives Qwen's kind the split of their own
        assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[1].eos_token == "<|end|>"


def test_fewer_bits_are_the_numbers_that_llama_cpp_computes_with(models: dict[str, tuple[Path, Path]], tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a wheel")
    file = tmp_path / "small.gguf"
    write_gguf_model(models["llama"][0], file, pre="gpt-2", kind="Q8_0")
    made = convert_gguf(file, tmp_path / "made", dtype=torch.float32)
    assert made.stored == ("Q8_0", "F32")
    base, whole = load_base(str(made.folder)), load_base(str(models["llama"][0]))
    ids = load_tokenizer(str(made.folder))(TEXTS[0]).input_ids
    ours, theirs = log_probabilities(base, ids), LlamaCpp(file).log_probabilities(ids, base.config.vocab_size)
    # llama.cpp rounds what it multiplies eight-bit weights with to eight bits, too.
    assert float((ours - theirs).abs().max()) < 0.5
    assert float((ours - log_probabilities(whole, ids)).abs().max()) > 1e-3, "eight bits are not all"


def test_bfloat16_is_what_is_written_without_a_word(models: dict[str, tuple[Path, Path]], tmp_path: Path):
    made = convert_gguf(models["llama"][1], tmp_path / "made")
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == made.dtype == "bfloat16"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_text_has_the_tokens_that_llama_cpp_gives_it(pre: str, models: dict[str, tuple[Path, Path]], tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a wheel")
    file = tmp_path / "model.gguf"
    write_gguf_model(models["llama"][0], file, pre=pre)
    tokenizer = load_tokenizer(str(convert_gguf(file, tmp_path / "made").folder))
    theirs = LlamaCpp(file)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == theirs.tokens(text), text
    plain = load_tokenizer(str(models["llama"][0]))
    differ = any(plain(text).input_ids != tokenizer(text).input_ids for text in TEXTS)
    assert differ == (pre != "gpt-2"), "the texts tell the splits apart"
    assert set(SPLITS.values()) == {SPLITS[name] for name in ("gpt-2", "smollm", "llama-bpe", "qwen2")}


@pytest.mark.parametrize("begin", [None, True, False])
@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_texts_begin_as_in_llama_cpp(
    pre: str, begin: bool | None, models: dict[str, tuple[Path, Path]], tmp_path: Path
):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a wheel")
    file = tmp_path / "model.gguf"
    write_gguf_model(models["llama"][0], file, pre=pre, begin=begin)
    tokenizer = load_tokenizer(str(convert_gguf(file, tmp_path / "made").folder))
    assert tokenizer(TEXTS[0]).input_ids == LlamaCpp(file).tokens(TEXTS[0], begin=True)


def test_control_tokens_keep_their_numbers(models: dict[str, tuple[Path, Path]], tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a wheel")
    file, token = tmp_path / "model.gguf", "<｜User▁1｜>"  # whose signs are not those of bytes
    write_gguf_model(models["llama"][0], file, pre="gpt-2", control=token)
    made = convert_gguf(file, tmp_path / "made").folder
    tokenizer, text = load_tokenizer(str(made)), f"one{token}two<|end|>"
    assert tokenizer(text, add_special_tokens=False).input_ids == LlamaCpp(file).tokens(text)
    assert len(tokenizer) == load_base(str(made)).config.vocab_size
    assert token not in tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)


# Out -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("ranks", [*(pytest.param(rank, marks=pytest.mark.slow) for rank in (4, 16)), "mixed"])
def test_llama_cpp_computes_what_peft_does(kind: str, ranks: Any, models: dict[str, tuple[Path, Path]], tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a wheel")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, file = models[kind]
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    model = LoraModel(load_base(str(folder)), target_modules=targets, scaling=1.7)
    some = {"q_proj": 3, "k_proj": 4, "v_proj": 4, "down_proj": 7}
    adapter, names = random_adapter(model, some if ranks == "mixed" else ranks), names_of(model.base.config)
    write_gguf_adapter(adapter, tmp_path / "adapter.gguf", names, scaling=1.7, base="own")
    export_adapter(adapter, tmp_path / "peft", base="own", target_modules=targets, scaling=1.7)
    with_peft: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "peft").eval()
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer(TEXTS[0]).input_ids
    # llama.cpp gives no probabilities with an end, nor with a part of a sign.
    while (after := int(log_probabilities(with_peft, ids).argmax())) in (0, 1) or not tokenizer.decode(
        [after]
    ).isascii():
        ids = ids[:-1]
    expected = log_probabilities(with_peft, ids)
    found = LlamaCpp(file, tmp_path / "adapter.gguf").log_probabilities(ids, len(expected))
    assert float((found - expected).abs().max()) < 1e-3
    alone = LlamaCpp(file).log_probabilities(ids, len(expected))
    assert not float((alone - expected).abs().max()) <= 0.1, "the adapter matters"
    if not ARCHITECTURES[kind]:
        return
    straight = GgufNames("qwen2", names.layers, names.heads, names.key_heads)  # whose rows keep their order
    wrong = tmp_path / "straight.gguf"
    write_gguf_adapter(adapter, wrong, straight, scaling=1.7, base="own")
    content = wrong.read_bytes().replace(b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0llama")
    wrong.write_bytes(content)
    found = LlamaCpp(file, wrong).log_probabilities(ids, len(expected))
    assert not float((found - expected).abs().max()) <= 1e-2, "without the other order of rows it is wrong"


def test_an_adapter_comes_back_as_it_was(models: dict[str, tuple[Path, Path]], tmp_path: Path):
    targets = ["q_proj", "k_proj", "o_proj", "up_proj"]
    model = LoraModel(load_base(str(models["llama"][0])), target_modules=targets, scaling=1.7)
    names = names_of(model.base.config)
    for ranks, allowed in ((3, 0.0), ({"q_proj": 3, "k_proj": 5, "o_proj": 3, "up_proj": 7}, 1e-6)):
        adapter, file = random_adapter(model, ranks), tmp_path / f"{allowed}.gguf"
        write_gguf_adapter(adapter, file, names, scaling=1.7, base="own")
        back = import_adapter(str(file), model)
        for module, (A, B) in adapter.items():
            assert torch.equal(back[module].A, A)
            assert float((back[module].B - B).abs().max()) <= allowed * float(B.abs().max())
    half = tmp_path / "half.gguf"
    write_gguf_adapter(adapter, half, names, scaling=1.7, base="own", dtype=torch.float16)
    assert half.stat().st_size < 0.6 * file.stat().st_size
    read = read_gguf_adapter(half, names).adapter
    assert all(torch.equal(read[module].A, pair.A.half().float()) for module, pair in adapter.items())


def test_a_run_is_exported_for_llama_cpp_and_begun_from_there(
    models: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "run.toml").write_text(phones(str(models["llama"][0])), encoding="utf8")
    # What lies beside the file is another program's, such as an adapter's configuration that names another base.
    shutil.copy(models["llama"][1], tmp_path / "model.gguf")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    convert_gguf("model.gguf", "base", dtype=torch.float32)
    assert main(["run", "run.toml", "--quiet", "--set", "model.base=base"]) == 0
    command = ["export", "runs/phones", "--format", "gguf", "--rank", "2", "--no-check", "--json", "--output"]
    assert main([*command, "taken", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["gguf"] == "taken/adapter.gguf"
    assert "ADAPTER ./adapter.gguf" in Path("taken/Modelfile").read_text("utf8")
    assert "llama-cli -m BASE.gguf --lora adapter.gguf" in Path("taken/README.md").read_text("utf8")
    again = ["--set", "model.base=base", "--set", "model.adapter=taken/adapter.gguf", "--set", "name=again"]
    assert main(["run", "run.toml", *again]) == 0
    assert "starting from the adapter in taken/adapter.gguf, of rank 2" in capsys.readouterr().err
    assert main([*command, "half", "--dtype", "float16", "--quiet"]) == 0
    for more, reason in (
        (["--dtype", "bfloat16"], "give --dtype float16"),
        (["--merged"], "leave --merged away"),
    ):
        given = [part for part in command if part not in (("--rank", "2") if "--merged" in more else ())]
        assert main([*given, "no", "--quiet", *more]) == 2
        assert reason in capsys.readouterr().err
        assert not Path("no").exists()


# Refused -------------------------------------------------------------------------------------------------------------


def test_what_is_not_tested_is_refused(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, file = models["llama"]
    content = file.read_bytes()

    def refused(name: str, changed: bytes) -> str:
        (tmp_path / name).write_bytes(changed)
        assert main(["base", str(tmp_path / name), str(tmp_path / "made")]) == 2
        assert not (tmp_path / "made").exists()
        return capsys.readouterr().err

    assert "is no GGUF file" in refused("text.gguf", b"hello")
    assert "is no GGUF file" in refused("cut.gguf", content[:500])
    assert "splits texts as 'gpt-9'" in refused("pre.gguf", content.replace(b"gpt-2", b"gpt-9"))
    assert "a tokenizer of the kind 'gpt3'" in refused("kind.gguf", content.replace(b"gpt2", b"gpt3", 1))
    assert "scales positions" in refused("rope.gguf", content.replace(b"output_norm.weight", b"rope_freqs.scaled!"))
    assert "architecture 'lampa'" in refused("of.gguf", content.replace(b"llama", b"lampa"))
    write_gguf_model(models["qwen2"][0], tmp_path / "digits.gguf", pre="smollm")
    assert "as Qwen2Tokenizer, which makes other tokens" in refused(
        "digits.gguf", (tmp_path / "digits.gguf").read_bytes()
    )
    assert main(["base", str(tmp_path / "none.gguf"), str(tmp_path / "made")]) == 2
    assert "is no file" in capsys.readouterr().err
    assert main(["base", str(file), str(tmp_path)]) == 2
    assert "nothing is written over" in capsys.readouterr().err
    with pytest.raises(ModelError, match=r"hetlora base \S+llama.gguf DIR makes a folder of it"):
        load_base(str(file))
    tied = GgufNames("llama", 2, 4, 2, tied=True)
    with pytest.raises(ModelError, match="leave lm_head out of model"):
        tied.gguf("lm_head")
    model = LoraModel(load_base(str(folder)))
    with pytest.raises(ModelError, match=r"general\.type and adapter\.type are"):
        import_adapter(str(file), model)
    other = tmp_path / "qwen.gguf"
    names = names_of(model.base.config)
    write_gguf_adapter(random_adapter(model, 2), other, GgufNames("qwen2", 2, 4, 2), scaling=1.0, base="own")
    with pytest.raises(ModelError, match="adapts a model of 'qwen2', and the base is of 'llama'"):
        read_gguf_adapter(other, names)


def test_numbers_that_transformers_reads_otherwise_are_noticed(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load = gguf_base._load

    def wrong(*given: Any) -> Any:
        base = load(*given)
        weight = base.get_submodule("model.layers.1.self_attn.q_proj").weight
        weight.data = weight.data.roll(1, 0)
        return base

    monkeypatch.setattr(gguf_base, "_load", wrong)
    with pytest.raises(ModelError, match=r"layers.1.self_attn.q_proj.weight of .* was read otherwise than llama.cpp's"):
        convert_gguf(models["llama"][1], tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_missing_package_is_said(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'hetlora\[gguf\]'"):
        convert_gguf(models["llama"][1], tmp_path / "made")
