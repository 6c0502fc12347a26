"""TensorRT's interfaces as C++ classes whose every method ends the test, made from NVIDIA's own headers of any version."""

import re

CLASSES = {  # class of ours -> interface
    "StubRuntime": "VRuntime",
    "StubCudaEngine": "VCudaEngine",
    "StubExecutionContext": "VExecutionContext",
    "StubPluginRegistry": "IPluginRegistry",
}


def stub_classes(headers: str) -> str:
    """The text of a header. `headers`: NvInferRuntime.h after the preprocessor."""
    parts = ["namespace nvinfer1 {"]
    for name, interface in CLASSES.items():
        body = re.search(rf"class {interface}\b[^;{{]*\{{(.*?)\n\}};", headers, re.S)
        assert body, interface
        methods = re.findall(r"virtual\s([^;{}]*?)=\s*0\s*;", body[1])
        assert len(methods) > 10, interface
        place = interface if interface.startswith("I") else f"apiv::{interface}"
        parts.append(f"class {name} : public {place} {{\n public:")
        for method in methods:
            called = re.search(r"(\w+)\s*\(", method)
            assert called, method
            parts.append(f'  {" ".join(method.split())} override {{ never("unexpected call of {called[1]}"); }}')
        parts.append("};")
    return "\n".join([*parts, "}", ""])
