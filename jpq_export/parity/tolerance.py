"""How far apart two correct runtimes may be: one table, each bound with its reason from arithmetic.

Both sides compute in fp32 with the same weights, so they differ only in the order of additions.

    u = 2**-24                 one rounding of fp32
    dot(K) = u sqrt(K)         RMS difference of two sums of K products added in different order, relative to the RMS
                               of the sum: each partial sum of j terms is rounded once, an error of u sqrt(j) in units
                               of one term; K of them in quadrature give u K / sqrt(2), the sum itself is sqrt(K), and
                               two such errors are independent.
    residual(d) = C dot(K) sqrt(1 + d)     after d sub-layers: each adds an independent error of dot(K) relative to what
                               it adds, and they meet in the residual stream; C = 4 covers the sub-layer's own chain of
                               two dot products, a softmax or activation, and the norm, which scales errors as values.
    inside(d) = 2 residual(d)  within a sub-layer: a norm or projection may favour the features that carry the error
                               (random ones would not change it; SmolLM2 and Gemma-3 stay below 0.4 residual(d)).
    PEAK = 8                   the largest single feature over the RMS bound: 5.5 sigma for the 10**7 values looked at,
                               and half as much again because errors in different features are not alike.
    EMBED = 4u                 code - zero times an fp16 scale is exact in fp32; embed_scale rounds once,
                               an embedding that is turned back (`turned_reads`) twice: 1.2 u measured at 1152.
    LOGITS_REL_RMS = 1e-4      the product's promise; residual(60) of a model 2048 wide is 9e-5.
    KL_MEAN = 1e-6             KL = var(error) / 2 under the reference's probabilities; logits with an RMS of 10 and a
                               relative error of 1e-4 give (1e-3)**2 / 2 = 5e-7, and fp32 logits round at 1e-6.
    int8(L)                    onnxruntime's low-bit kernels by default round activations to 8 bits, in blocks with one
                               scale: half a step of peak / 127 is an RMS of peak / 440, and the peak of a block of
                               64 is at most 8 times its RMS: 1.8% a product. Four products follow each other in a
                               layer; independent errors meet in quadrature, and layers magnify by 2. SmolLM2 (30
                               layers): bound 0.39, measured 0.06 on text, 0.29 on random tokens; a wrong kernel: 1.4.
    half(L)                    products in fp16: X, the matrix and the result are each rounded to 11 bits, an RMS of
                               2^-12 / sqrt(3) or less each, together 2^-12 a product; sums are in fp32. Four products
                               follow each other in a layer, attention rounds four more values (q, k, v, its result);
                               in quadrature, magnified by 4. SmolLM2 (30 layers): 1.5e-2; wrong scales give 0.2.
    flips                      a model that itself rounds activations to 8 bits (`ModelSpec.activations`): where
                               x / step lies within fp32's error of a half, two right runtimes choose different codes,
                               and every flip moves other values across such borders, until after some layers both
                               have rounded independently. So a linear is judged from the input its own runtime gave
                               it, where the codes are the same and dot(K) holds; every other value by int8(L).
    SMALL_EFFECT = 5e-3        nats of KL, half a percent of perplexity: what such rounding may cost unremarked.
"""

from __future__ import annotations

from jpq_export.format.encoder_spec import Spec
from jpq_export.format.spec import INT8_ACTIVATIONS, ModelSpec

UNIT_ROUNDOFF = 2.0**-24
EMBED = 4 * UNIT_ROUNDOFF
LOGITS_REL_RMS = 1e-4
KL_MEAN = 1e-6
SMALL_EFFECT = 5e-3
HALF_PRODUCT = 2.0**-12
INT8_PRODUCT = 8 / (127 * 12**0.5)
PEAK = 8.0
CHAIN = 4.0
INSIDE = 2.0


def dot(terms: int) -> float:
    """Relative RMS difference of two fp32 sums of `terms` products."""
    return UNIT_ROUNDOFF * terms**0.5


def longest_sum(spec: Spec) -> int:
    """The longest dot product in the model."""
    return max(columns for _, columns in spec.matrices().values())


def residual(spec: Spec, depth: int) -> float:
    """Bound on the residual stream after `depth` sub-layers."""
    if flips(spec) and depth:
        return int8(spec)
    return CHAIN * dot(longest_sum(spec)) * (1 + depth) ** 0.5


def inside(spec: Spec, depth: int) -> float:
    """Bound on a value inside the sub-layer that comes after `depth` others."""
    if flips(spec):
        return int8(spec)
    return INSIDE * residual(spec, depth)


def flips(spec: Spec) -> bool:
    """Whether the model itself rounds activations, so that rounding errors are amplified to flipped codes."""
    return isinstance(spec, ModelSpec) and spec.activations == INT8_ACTIVATIONS


def logits(spec: Spec) -> float:
    """Bound on logits."""
    return int8(spec) if flips(spec) else LOGITS_REL_RMS


def kl_mean(spec: Spec) -> float:
    """Bound on KL, nats a token: as a relative error of `logits` allows, for logits with an RMS of 10."""
    return (10 * logits(spec)) ** 2 / 2 if flips(spec) else KL_MEAN


def int8(spec: Spec) -> float:
    """Bound on logits when activations are rounded to 8 bits; wide, it tells a wrong kernel from a rough one."""
    return 2 * INT8_PRODUCT * (4 * len(spec.layers)) ** 0.5


def half(spec: Spec) -> float:
    """Bound on logits when products and attention are computed in fp16."""
    return 4 * HALF_PRODUCT * (8 * len(spec.layers) + 1) ** 0.5


def greedy_tie(logits_rms: float, spec: Spec) -> float:
    """Top-two margin that rounding alone may turn round: each of the two logits may move by the promised error."""
    return 2 * logits(spec) * logits_rms
