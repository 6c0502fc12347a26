"""`jpq::LowBitChain`: what lies between one attention and the next as one operator.

Output product, residual sum, norm, MLP, residual sum, norm and the next query, key and value need seven operators, and
every product among them hands its tasks to waiting threads. As one, a token's work passes from product to product on
threads that are there already. It is for onnxruntime on a CPU: `plugins/onnxruntime/chain_op.c`. The body is what
`functions.py` and `rowwise.py` write, for an onnxruntime without our library.

A chain is made of links: products of what the link before gave, then `then`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from jpq_export.lower import functions, rowwise
from jpq_export.lower.functions import DOMAIN, Part, Several
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.standard import ACTIVATIONS

OP_TYPE = "LowBitChain"
GIVE, SUM_NORM, SILU, GELU_TANH, SUM = range(5)  # `then`: what chain_op.c does with the products of a link
GATES = {"silu": SILU, "gelu_tanh": GELU_TANH}
MOST_LINKS = 8


@dataclass(frozen=True, slots=True)
class Link:
    """Products of one X and what happens to them; `norms`: the post norm, if any, and the norm of a sum."""

    parts: tuple[Part, ...]
    then: int
    post: bool = False
    norms: tuple[ir.Value, ...] = ()

    @property
    def overload(self) -> str:
        """What the body depends on: "k576__b4_g64_sym_n1536__b4_g64_sym_n1536_then2"."""
        several = Several(self.parts[0].in_features, tuple((part.variant, part.out_features) for part in self.parts))
        return f"{several.overload}_then{self.then}" + ("_post" if self.post else "")


@dataclass(slots=True)
class Chain:
    """A chain while it is written. `sums`: the stream after every sum so far, by value; `eps`: of all its norms.

    Values of what a link gives exist before their node does, which `close` appends.
    """

    x: ir.Value
    stream: ir.Value
    eps: float
    links: list[Link] = field(default_factory=list)
    sums: list[ir.Value] = field(default_factory=list)

    def gate(self, parts: Sequence[Part], activation: str) -> None:
        """activation(first product) * second."""
        self.links.append(Link(tuple(parts), GATES[activation]))

    def sum(self, part: Part, name: str, norm: ir.Value | None, post: ir.Value | None) -> ir.Value:
        """The stream plus the product, which passes the norm `post` first: value `name`; then its `norm` is at hand."""
        norms = tuple(each for each in (post, norm) if each is not None)
        self.links.append(Link((part,), SUM if norm is None else SUM_NORM, post is not None, norms))
        self.sums.append(ir.Value(name=name))
        return self.sums[-1]

    def give(self, parts: Sequence[Part], names: Sequence[str], nodes: Nodes) -> tuple[ir.Value, ...]:
        """Close the chain with products, values `names`."""
        self.links.append(Link(tuple(parts), GIVE))
        return self._append(nodes, [ir.Value(name=name) for name in names])

    def close(self, nodes: Nodes, normed: str) -> ir.Value | None:
        """Close it behind a sum; its norm, value `normed`, where there is one."""
        last = self.links[-1].then
        assert last in (SUM, SUM_NORM), last
        given = self._append(nodes, [ir.Value(name=normed)] if last == SUM_NORM else [])
        return given[0] if given else None

    @property
    def overload(self) -> str:
        """Name of the function's overload: of its links, and the epsilon of its norms."""
        return "___".join([f"e{self.eps:g}", *(link.overload for link in self.links)])

    def _append(self, nodes: Nodes, given: list[ir.Value]) -> tuple[ir.Value, ...]:
        inputs = [self.x, self.stream]
        for link in self.links:
            inputs += [value for part in link.parts for value in part.inputs] + list(link.norms)
        outputs, facts = [*self.sums, *given], ir.convenience.convert_attributes(self.attributes())
        what = {"overload": self.overload, "outputs": outputs, "name": outputs[0].name}
        nodes.nodes.append(ir.Node(DOMAIN, OP_TYPE, inputs, facts, **what))
        return tuple(given)

    def attributes(self) -> dict[str, int | float]:
        """What the kernel is told: of link i "count_i", "then_i" and "post_i", of weight j "bits_j", "K_j", ..."""
        out: dict[str, int | float] = {"links": len(self.links), "epsilon": self.eps}
        parts = [part for link in self.links for part in link.parts]
        for i, link in enumerate(self.links):
            out |= {f"count_{i}": len(link.parts), f"then_{i}": link.then, f"post_{i}": int(link.post)}
        for j, part in enumerate(parts):
            facts = functions.facts_of(part.variant, part.out_features) | {"K": part.in_features}
            out |= {f"{name}_{j}": fact for name, fact in facts.items()}
        return out

    def function(self, opset: int) -> ir.Function:
        """The ONNX function. It repeats the bodies of its parts: onnxruntime knows no overload inside a function."""
        nodes, x, stream = Nodes(), ir.Value(name="X"), ir.Value(name="stream")
        inputs, sums = [x, stream], []
        here = [x]
        for i, link in enumerate(self.links):
            products = []
            for j, part in enumerate(link.parts):
                mine = {name: ir.Value(name=f"{name}_{i}_{j}") for name in part.variant.inputs[1:]}
                inputs += mine.values()
                products.append(functions.matmul(nodes, part.variant, {"X": here[0]} | mine))
            norms = [ir.Value(name=f"norm_{i}_{j}") for j in range(len(link.norms))]
            inputs += norms
            here = products
            if link.then in (SILU, GELU_TANH):
                here = [nodes("Mul", ACTIVATIONS[_activation(link.then)](nodes, here[0]), here[1])]
            elif link.then != GIVE:
                y = rowwise.norm(nodes, here[0], norms[0], self.eps) if link.post else here[0]
                sums.append(nodes("Add", sums[-1] if sums else stream, y))
                here = [rowwise.norm(nodes, sums[-1], norms[-1], self.eps)] if link.then == SUM_NORM else []
        graph = ir.Graph(inputs, [*sums, *here], nodes=nodes.nodes, opset_imports={"": opset}, name=OP_TYPE)
        kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}
        attributes = [ir.Attr(name, kinds[type(fact)], None) for name, fact in self.attributes().items()]
        return ir.Function(DOMAIN, OP_TYPE, self.overload, graph=graph, attributes=attributes)


def _activation(then: int) -> str:
    return next(name for name, code in GATES.items() if code == then)
