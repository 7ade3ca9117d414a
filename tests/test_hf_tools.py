"""What people run on models of transformers: pipelines, sentence encoders, evaluations."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble

transformers = pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")

from .hf_models import MODELS

WORDS = [f"word{i}" for i in range(90)]
TEXTS = ["word1 word2 word3", "word7 word8 word9 word10", "word5"]


def tokenizer() -> Any:
    """Words to the numbers 6 to 95, as the models of hf_models take them."""
    special = ["<s>", "</s>", "<pad>", "<unk>", "[CLS]", "[MASK]"]
    words = {word: i for i, word in enumerate(special + WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "[MASK]",
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **names)


def saved(directory: Path, name: str, scheme: str | None) -> Any:
    """A model with a tokenizer, quantized if there is a scheme, in a directory."""
    model = MODELS[name][0]()
    if scheme is not None:
        nybble.quantize(model, scheme, goal="memory")
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model


def test_a_pipeline_that_generates(tmp_path) -> None:
    model = saved(tmp_path, "llama-tied", "w8a8")
    told = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = transformers.pipeline("text-generation", model=str(tmp_path))
    expected = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    assert isinstance(found.model.lm_head, nybble.nn.Linear)
    assert found(TEXTS, **told) == expected(TEXTS, **told)
    assert found(TEXTS[0], **told)[0]["generated_text"].startswith(TEXTS[0])


def test_a_pipeline_that_fills_masks(tmp_path) -> None:
    model = saved(tmp_path, "bert-tied", "w4a8g32")
    text = "word1 [MASK] word3"
    found = transformers.pipeline("fill-mask", model=str(tmp_path))(text)
    expected = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer())(text)
    assert found == expected
    assert len(found) == 5


def test_a_pipeline_that_rounds(tmp_path) -> None:
    saved(tmp_path, "bert", None)
    config = {"quantization_config": nybble.HfConfig("w8a8")}
    found = transformers.pipeline("text-classification", model=str(tmp_path), model_kwargs=config)
    assert isinstance(found.model.classifier, nybble.nn.Linear)
    assert [set(one) for one in found(TEXTS)] == [{"label", "score"}] * 3


def test_sentence_transformers(tmp_path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    saved(tmp_path / "dense", "bert", None)
    parts = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    config = {"quantization_config": nybble.HfConfig("w8a8")}
    encoders = [
        sentence_transformers.SentenceTransformer(
            modules=[
                word := parts.Transformer(str(tmp_path / "dense"), model_kwargs=told),
                parts.Pooling(word.get_embedding_dimension()),
            ],
            device="cpu",
        )
        for told in (config, {})
    ]
    rounded, dense = encoders
    nybble.quantize(dense, "w8a8", goal="memory")
    vectors = rounded.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(vectors, dense.encode(TEXTS, convert_to_tensor=True))
    for i, one in enumerate(encoders):
        one.save(str(tmp_path / str(i)))
        again = sentence_transformers.SentenceTransformer(str(tmp_path / str(i)), device="cpu")
        assert any(isinstance(part, nybble.nn.Linear) for part in again.modules())
        assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), vectors)


TASK = """
task: nybble_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: [word1, word2, word3]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def test_lm_eval(tmp_path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = saved(tmp_path / "model", "llama", "w8a8")
    rows = [{"text": text, "label": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(TASK.format(file=tmp_path / "rows.json"))
    manager = TaskManager(include_path=str(tmp_path / "tasks"))

    def answers(pretrained: Any) -> list[Any]:
        judge = HFLM(pretrained=pretrained, tokenizer=tokenizer(), device="cpu", batch_size=1)
        told = lm_eval.simple_evaluate(judge, tasks=["nybble_words"], task_manager=manager, bootstrap_iters=0)
        return [row["resps"] for row in told["samples"]["nybble_words"]]

    found = answers(str(tmp_path / "model"))
    assert len(found) == 3
    assert found == answers(model)
    nybble.quantize(other := MODELS["llama"][0](), "w4a16g32", include="*proj", goal="memory")
    nybble.save_pretrained(other, tmp_path / "gptq", format="gptq", round_scales=True)
    end = nybble.patch_transformers()
    try:
        found = answers(str(tmp_path / "gptq"))  # lm-eval itself names the configuration of the checkpoint
    finally:
        end()
    assert found == answers(nybble.load_pretrained(tmp_path / "gptq")[0])


def test_a_model_on_the_meta_device_may_be_the_first_that_needs_transformers() -> None:
    """transformers imports its models late, and nybble registers then: its own tensors must not become meta tensors."""
    code = (
        "import torch, nybble, transformers\n"
        "sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)\n"
        "with torch.device('meta'):\n"
        "    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))\n"
        "assert model.lm_head.weight.is_meta\n"
        "assert nybble.HfConfig('w8a8').scheme == 'w8a8'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
