"""NVIDIA's own `tensorrt.plugin` (Python, from its dispatch package) over a module that is NOT all of TensorRT.

NVIDIA's: registry, creators, decorators with their checks, and the plugin class that TensorRT's builder calls.
Stand-ins: what the dispatch runtime leaves to a builder (symbolic expressions, here evaluated; tensor formats).
Run with a bundle, an SM and nodes as JSON; writes what the builder would be told of each.
"""

import json
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import tensorrt_dispatch_bindings as real

from jpq_export.engine import aot


class Expression:
    """A stand-in for IDimensionExpr: a number and how it was made."""

    def __init__(self, value, text=None):
        self.value, self.text = value, text or str(value)

    def is_constant(self):
        return self.text == str(self.value)

    def get_constant_value(self):
        return self.value


class Builder:
    """A stand-in for IExprBuilder."""

    def constant(self, value):
        return Expression(value)

    def operation(self, kind, first, second):
        a, b = first.value, second.value
        known = {"SUM": a + b, "PROD": a * b, "CEIL_DIV": -(-a // b)}
        return Expression(known[kind.name], f"{kind.name}({first.text}, {second.text})")


class Formats(IntEnum):
    LINEAR = 0


class Argument:
    """A stand-in for ISymExpr: an argument of a launch."""


def stand_in():
    """`tensorrt` as the dispatch package has it, with what it lacks."""
    module = ModuleType("tensorrt")
    vars(module).update({name: getattr(real, name) for name in dir(real) if not name.startswith("__")})
    module.IDimensionExpr, module.IExprBuilder, module.ISymExpr = Expression, Builder, Argument
    module.DimsExprs = lambda count: [None] * count
    module.TensorFormat, module.ITensor = Formats, type("ITensor", (), {})
    module.PluginTensorDesc = SimpleNamespace
    module.__path__ = real.__path__
    sys.modules["tensorrt"] = module
    import tensorrt.plugin as trtp

    return module, trtp


class Launch(SimpleNamespace):
    """A stand-in for ISymExprs and IKernelLaunchParams: keeps what it is given."""

    def __setitem__(self, index, value):
        self.__dict__.setdefault("scalars", {})[index] = value.expr


def ask(trt, node):
    """Build a node's plugin as the parser does, and ask it what TensorRT's builder asks."""
    fields = [trt.PluginField(name, make_int(value), trt.PluginFieldType.INT64) for name, value in node["attributes"]]
    creator = trt.get_plugin_registry().get_creator(node["op"], "1", "jpq")
    assert creator is not None
    from tensorrt.plugin import _lib

    creator = _lib.QDP_CREATORS[f"jpq::{node['op']}"]  # the Python object behind the registry's
    request = trt.QuickPluginCreationRequest.UNKNOWN
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin(node["op"], "jpq", collection, trt.TensorRTPhase.BUILD, request)
    kinds = [getattr(trt.DataType, kind) for kind, _ in node["inputs"]]
    (out_kind,) = plugin.get_output_data_types(kinds, [len(shape) for _, shape in node["inputs"]])
    sizes = [[Expression(abs(d), None if d > 0 else f"dim{i}") for i, d in enumerate(s)] for _, s in node["inputs"]]
    (out_shape,) = plugin.get_output_shapes(sizes, [], Builder())
    sides = [SimpleNamespace(type=kind, format=Formats.LINEAR, scale=1.0) for kind in (*kinds, out_kind)]
    tensors = [SimpleNamespace(desc=side) for side in sides]
    return plugin, sizes, tensors, {"type": out_kind.name, "shape": [e.text for e in out_shape]}


def make_int(value):
    import numpy as np

    return np.array([value], np.int64)


def answer(trt, node):
    """Everything the builder would be told: output, tactics, and a launch for each."""
    plugin, sizes, tensors, out = ask(trt, node)
    import tensorrt.plugin._plugin_class as nvidia

    nvidia.Shape = lambda desc: None  # numbers of a profile: nothing here looks at them
    combinations = plugin.get_supported_format_combinations(tensors, len(sizes))
    plugin.curr_comb = next(iter(plugin.supported_combs))
    launches = []
    for tactic in plugin.get_valid_tactics():
        plugin.set_tactic(tactic)
        launch, scalars = Launch(), Launch()
        plugin.get_launch_params(sizes, tensors, len(sizes), launch, scalars, Builder())
        name, ptx = plugin.get_kernel([t.desc for t in tensors[:-1]], [tensors[-1].desc])
        shown = {key: value.expr.value for key, value in vars(launch).items()}
        texts = {key: value.expr.text for key, value in vars(launch).items()}
        numbers = [scalars.scalars[i].value for i in range(scalars.nbSymExprs)]
        launches.append({"tactic": tactic, "entry": name, "ptx": ptx.decode(), "launch": shown, "scalars": numbers})
        launches[-1]["symbolic"] = texts
    return {"out": out, "types": [desc.type.name for desc in combinations], "launches": launches}


if __name__ == "__main__":
    trt, trtp = stand_in()
    aot.register(trt, trtp, aot.read_kernels(Path(sys.argv[1])), int(sys.argv[2]))
    listed = [trt.get_plugin_registry().get_creator(op, "1", "jpq") is not None for op in aot.INPUTS]
    answers = [answer(trt, node) for node in json.loads(sys.argv[3])]
    sys.stdout.write("\n" + json.dumps({"registered": listed, "nodes": answers}))
