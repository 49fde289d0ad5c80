"""What a base computes in bfloat16, as `--dtype auto` has it on CPUs with AMX or AVX512-BF16, beside float32."""

import pytest
import torch
from make_tiny_model import make_tiny_model
from training_steps import trained

from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_base_model, load_tokenizer

GENERATIONS = ["chatglm", "chatglm2", "chatglm3", "glm4", "glm4_0414"]
ROUNDING = 2**-8  # of a number of bfloat16, relative to it


@pytest.fixture(scope="module", params=GENERATIONS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base that is stored in bfloat16, so that both precisions have the same weights."""
    path = tmp_path_factory.mktemp("bfloat16") / request.param
    return str(make_tiny_model(path, request.param, hidden_size=64, dtype="bfloat16"))


@pytest.mark.parametrize("bits", [None, 4])
def test_loss_and_gradients_are_those_of_float32_within_rounding(folder: str, bits: int | None):
    steps = [trained(ModelArguments(folder, dtype=dtype, quantization_bit=bits)) for dtype in ("float32", "bfloat16")]
    (_, (loss, *gradients)), (base, (rounded, *others)) = steps
    assert base.dtype == torch.bfloat16
    assert rounded.item() == pytest.approx(loss.item(), rel=2 * ROUNDING)
    for exact, other in zip(gradients, others, strict=True):
        assert other.dtype == torch.float32  # the adapter's
        assert (other - exact).norm() < 8 * ROUNDING * exact.norm()


def test_answers_are_those_of_float32_where_the_likeliest_token_is_clear(folder: str):
    ids = load_tokenizer(ModelArguments(folder))("类型#裤*版型#宽松", return_tensors="pt")["input_ids"]
    exact, rounded = (load_base_model(ModelArguments(folder, dtype=dtype), "cpu") for dtype in ("float32", "bfloat16"))
    tokens = exact.generate(ids, min_new_tokens=24, max_new_tokens=24, do_sample=False)
    with torch.no_grad():
        wanted, found = (base(input_ids=tokens).logits[0, ids.shape[1] - 1 : -1] for base in (exact, rounded))
    off = (found - wanted).abs().max()
    assert off < 16 * ROUNDING * wanted.abs().max()
    best = wanted.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > 2 * off
    assert is_clear.sum() > 4
    assert torch.equal(found.argmax(-1)[is_clear], wanted.argmax(-1)[is_clear])
