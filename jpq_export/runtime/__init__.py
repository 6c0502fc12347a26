"""Run a bundle without torch: `load(folder).generate(prompt)`, `.chat(messages)`, `.embed(texts)`."""

from jpq_export.runtime.bundle import Bundle, load

__all__ = ["Bundle", "load"]
