"""Opening a bundle, chat templates, streamed text, and a light import."""

import json
import shutil
import subprocess
import sys

import pytest

from jpq_export.errors import BundleError, CapacityError, UsageError
from jpq_export.runtime.bundle import load
from jpq_export.runtime.chat import chat_text
from jpq_export.runtime.generate import generate
from jpq_export.runtime.text import stream_text


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return load(bundle_folder, threads=1)


@pytest.fixture
def own(bundle_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(bundle_folder, tmp_path / "copy")


def test_text_is_the_tokens_of_generate(bundle):
    text = bundle.generate("w3 w4 w5", max_new_tokens=8, stop_ids=[])
    ids = list(generate(bundle.model, bundle.encode("w3 w4 w5"), max_new_tokens=8, stop_ids=[]))
    assert "w3 w4 w5" + text == bundle.tokenizer.decode(bundle.encode("w3 w4 w5") + ids)
    assert len(text.split()) > 1


def test_chat_template(bundle):
    ids = bundle.encode_chat("w3 w4")
    assert bundle.tokenizer.decode(ids, skip_special_tokens=False) == "<s> w3 w4 </s> w7"
    assert bundle.encode("w3 w4") == [5, 6]


def test_bos_is_added_once(make_bundle):
    from dataclasses import replace

    from jpq_export.format.spec import ModelSpec

    spec = load(make_bundle()).model.spec
    assert isinstance(spec, ModelSpec)
    bundle = load(make_bundle(spec=replace(spec, add_bos=True)))
    assert bundle.encode("w3") == [0, 5]
    assert bundle.encode("<s> w3") == [0, 5]
    assert bundle.encode_chat("w3") == [0, 5, 1, 9]


def test_a_template_may_refuse(own):
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ raise_exception('only pairs') }}"}))
    with pytest.raises(UsageError, match="chat template fails \\(only pairs\\)"):
        load(own).encode_chat("w3")


def test_a_template_cannot_reach_python(own):
    config = {"chat_template": "{{ messages.__class__.__mro__[-1].__subclasses__() }}"}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="chat template fails"):
        load(own).encode_chat("w3")


def test_no_template(own):
    (own / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="no chat template"):
        load(own).encode_chat("w3")


def test_a_damaged_file_is_found_when_asked(own):
    data = bytearray((own / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (own / "model.onnx.data").write_bytes(data)
    load(own)
    with pytest.raises(BundleError, match=r"\.packed: the stored bytes"):
        load(own, check=True)


def test_an_undamaged_bundle_passes_the_check(bundle_folder):
    load(bundle_folder, check=True)


@pytest.mark.parametrize(("name", "message"), [("manifest.json", "not a bundle"), ("tokenizer.json", "missing")])
def test_a_missing_file(own, name, message):
    (own / name).unlink()
    with pytest.raises(BundleError, match=message):
        load(own)


def test_a_broken_tokenizer(own):
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="not a readable tokenizer"):
        load(own)


def test_a_tokenizer_of_another_model(make_bundle):
    folder = make_bundle(words=[f"w{i}" for i in range(60)] + ["</s>"])
    with pytest.raises(BundleError, match="has 61 tokens, the model 40"):
        load(folder)


def test_a_character_of_several_tokens_comes_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(byte_level)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = tokenizer.encode("aé 中🙂 z").ids
    assert list(stream_text(tokenizer, iter(ids))) == ["a", "é", " ", "中", "🙂", " ", "z"]
    assert "".join(stream_text(tokenizer, iter(ids[:2]))) == "a\ufffd"  # cut inside a character


def test_spaces_between_words_survive(bundle):
    ids = bundle.tokenizer.encode("w3 w4 w5 w6").ids
    assert list(stream_text(bundle.tokenizer, iter(ids))) == ["w3", " w4", " w5", " w6"]


def test_running_a_bundle_loads_neither_torch_nor_transformers(bundle_folder):
    code = (
        "import sys; from pathlib import Path; from jpq_export.runtime.bundle import load\n"
        "print(load(Path(sys.argv[1])).chat('w3', max_new_tokens=4))\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import jpq_export.compress.decoder\n"
        "assert 'torch' in sys.modules"  # twin: the same check does see torch
    )
    subprocess.run([sys.executable, "-c", code, str(bundle_folder)], check=True, capture_output=True, text=True)


def test_importing_the_runtime_loads_no_onnxruntime():
    code = (
        "import sys, jpq_export.runtime.bundle; sys.exit('onnxruntime' in sys.modules or 'tokenizers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_list_of_prompts_gets_a_list_of_texts(bundle):
    prompts = ["w3 w4 w5", "w9", "w8 w7"]
    got = bundle.generate(prompts, max_new_tokens=6, batch_size=2)
    assert got == [bundle.generate(prompt, max_new_tokens=6) for prompt in prompts]
    assert len(set(got)) == 3
    assert bundle.generate([]) == []


def test_streamed_pieces_are_the_text(bundle):
    pieces = list(bundle.generate("w3 w4", max_new_tokens=8, stream=True))
    assert "".join(pieces) == bundle.generate("w3 w4", max_new_tokens=8)
    assert len(pieces) > 2
    assert all(pieces)


def test_a_list_is_not_streamed(bundle):
    with pytest.raises(UsageError, match="stream: one prompt at a time"):
        bundle.generate(["w3"], stream=True)


def test_stop_texts_may_be_one_or_several(bundle):
    free = bundle.generate("w3 w4", max_new_tokens=8)
    stop = free.split()[3]
    assert bundle.generate("w3 w4", max_new_tokens=8, stop=stop) == free[: free.index(stop)]
    assert bundle.generate("w3 w4", max_new_tokens=8, stop=["never", stop]) == free[: free.index(stop)]


def test_the_capacity_is_fixed_when_the_bundle_is_opened(bundle_folder):
    small = load(bundle_folder, threads=1, capacity=10)
    assert small.generate("w3 " * 7, max_new_tokens=3)
    with pytest.raises(CapacityError, match="7 tokens and 4 new ones need more than the capacity of 10 tokens"):
        small.generate("w3 " * 7, max_new_tokens=4)
    with pytest.raises(CapacityError, match="capacity of 24"):  # at once, not at the first piece
        load(bundle_folder, threads=1).generate("w3 " * 7, max_new_tokens=18, stream=True)


@pytest.mark.parametrize("capacity", [0, -1, 25])
def test_a_capacity_the_model_has_not(bundle_folder, capacity):
    with pytest.raises(UsageError, match=f"capacity: got {capacity}, expected 1 to 24"):
        load(bundle_folder, capacity=capacity)


def test_a_chat_of_several_messages(bundle):
    messages = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    text = chat_text(bundle.tokenizer_config, messages, where="here")
    assert text == "<s> w3 </s><s> w4 </s> w7"
    assert bundle.encode_chat(messages) == bundle.tokenizer.encode(text, add_special_tokens=False).ids
    assert bundle.chat(messages, max_new_tokens=5) == bundle.generate(text, max_new_tokens=5)


def test_of_several_templates_the_default_one_is_taken(own):
    templates = [{"name": "tool_use", "template": "w1"}, {"name": "default", "template": "w2 {{ messages|tojson }}"}]
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert load(own).encode_chat("w3")[0] == 4


def test_a_text_that_is_no_unicode(bundle):
    with pytest.raises(UsageError, match="not valid Unicode"):
        bundle.generate("\ud800")


def test_importing_the_runtime_takes_less_than_half_a_second():
    """Processor time of this process alone, so that a busy machine does not count."""
    code = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"

    def seconds(module):
        done = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert min(seconds("jpq_export.runtime") for _ in range(3)) < 0.5
    assert seconds("jpq_export.compress.decoder") > 0.5  # twin: torch takes longer
