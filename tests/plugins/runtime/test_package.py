"""plugins/runtime as an installed package: the examples built outside the tree, under the sanitizers."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jpq_export.runtime import load, native
from jpq_export.runtime.generate import generate
from jpq_export.runtime.session import OrtModel


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The two commands of the README, then the examples as a project outside the tree: their folder."""
    if not shutil.which("cmake") or not shutil.which("gcc"):
        pytest.skip("no cmake or no gcc")
    folder = tmp_path_factory.mktemp("package")
    source = native.sources_folder() / "runtime"
    shutil.copytree(source / "examples", folder / "consumer")

    def step(*command):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    sanitize = ("-DJPQ_SANITIZE=ON", "-DJPQ_KERNELS=OFF", "-DJPQ_EXAMPLES=OFF")
    step("cmake", "-S", source, "-B", folder / "build", f"-DCMAKE_INSTALL_PREFIX={folder / 'prefix'}", *sanitize)
    step("cmake", "--build", folder / "build", "--target", "install", "-j", "2")
    step("cmake", "-S", folder / "consumer", "-B", folder / "out", f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}")
    step("cmake", "--build", folder / "out", "-j", "2")
    return folder / "out"


@pytest.fixture(scope="module")
def words(bundle_folder, tmp_path_factory):
    """The tiny bundle with the same words in a kind of tokenizer that the library knows: (folder, tokenizer)."""
    folder = shutil.copytree(bundle_folder, tmp_path_factory.mktemp("words") / "tiny")
    return folder, put_known_tokenizer(folder)


def put_known_tokenizer(folder):
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture
def run(examples, onnxruntime_library):
    """`run("generate", bundle, prompt, ..., JPQ_IDS="1")`: the finished process."""

    def run(name, *arguments, **environment):
        if not (examples / name).exists():
            pytest.skip(f"{name} was not built: no C++ compiler")
        own = {"JPQ_ONNXRUNTIME": str(onnxruntime_library.parent), "JPQ_THREADS": "1"}
        return subprocess.run(
            [str(examples / name), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, **own, **environment},
        )

    return run


def test_a_project_outside_the_tree_generates_the_tokens_of_python(run, words):
    prompt, (folder, tokenizer) = "w3 w9 w4", words
    ids = tokenizer.encode(prompt).ids
    model = OrtModel(folder / "model.onnx", threads=1)
    expected = list(generate(model, ids, max_new_tokens=12, stop_ids=model.spec.eos_ids))
    done = run("generate", folder, prompt, 12, JPQ_IDS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(line) for line in done.stdout.split()] == expected
    assert len(expected) > 2
    other = run("generate", folder, "w9 w3 w4", 12, JPQ_IDS="1")
    assert other.stdout != done.stdout


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_seed_draws_the_tokens_of_python(run, words, top_p):
    prompt, (folder, tokenizer) = "w3 w9", words
    ids, model = tokenizer.encode(prompt).ids, OrtModel(folder / "model.onnx", threads=1)
    drawn = {}
    for seed in (1, 2, 2**63 + 5):
        done = run("generate", folder, prompt, 15, 1.5, seed, top_p, JPQ_IDS="1")
        drawn[seed] = [int(line) for line in done.stdout.split()]
        expected = list(generate(model, ids, max_new_tokens=15, temperature=1.5, top_p=top_p, seed=seed))
        assert drawn[seed] == expected, done.stderr[-3000:]
    assert drawn[1] != drawn[2]


def test_embeddings_are_those_of_python(run, conftest_of, tmp_path):
    folder = conftest_of("runtime").write_encoder_bundle(tmp_path / "encoder")
    put_known_tokenizer(folder)
    texts = ["w3 w4", "w9", "w1 w2 w3 w4 w5 w6"]
    done = run("embed", folder, *texts, JPQ_VECTORS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    got = np.array([[float(value) for value in line.split("  ")[0].split()] for line in done.stdout.splitlines()])
    expected = load(folder, threads=1).embed(texts)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-6)  # nine digits of floats of at most 1
    assert np.abs(got - np.roll(expected, 1, axis=0)).max() > 0.1


def test_a_text_beyond_the_models_positions_is_refused_not_cut(run, conftest_of, tmp_path):
    folder = conftest_of("runtime").write_encoder_bundle(tmp_path / "encoder", positions=6)
    put_known_tokenizer(folder)
    path = folder / "tokenizer.json"
    cutting = {"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": cutting}))
    assert run("embed", folder, "w1 w2 w3 w4 w5 w6", "w3").returncode == 0
    done = run("embed", folder, "w3", "w1 w2 w3 w4 w5 w6 w7")
    assert done.returncode == 1
    assert "text 1 has 7 tokens, expected at most 6" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere", "w3"], 1, "nowhere"),
        (["{bundle}", "w3 " * 30, 4], 1, "more than the model's 24 positions"),
        (["{bundle}", "w3", 4, -1], 1, "temperature"),
        (["{bundle}"], 2, "usage"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_code(run, words, arguments, code, says):
    given = [str(a).replace("{bundle}", str(words[0])) for a in arguments]
    done = run("generate", *given)
    assert done.returncode == code, done.stderr[-3000:]
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_decoder_is_no_encoder(run, bundle_folder):
    done = run("embed", bundle_folder, "w3", "w4")
    assert done.returncode == 1
    assert "is a decoder" in done.stderr


def test_a_manifest_of_another_format_is_refused(run, own_bundle):
    raw = json.loads((own_bundle / "manifest.json").read_text())
    (own_bundle / "manifest.json").write_text(json.dumps(raw | {"format": "jpq-bundle/9"}))
    done = run("generate", own_bundle, "w3")
    assert done.returncode == 1
    assert "jpq-bundle/9" in done.stderr
