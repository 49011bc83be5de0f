"""Formulas of pages (`$...$`, `$$...$$`) and docstrings (`:math:`, `.. math::`) as MathML, which browsers draw."""

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

_DIRECTIVE = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>.*)(?P<rest>(?:\n(?P=indent) +\S.*|\n[ ]*(?=\n(?P=indent) +\S))*)",
    re.MULTILINE,
)
_DOLLARS = re.compile(r"^(?P<indent> *)\$\$(?P<body>.+?)\$\$ *$", re.MULTILINE | re.DOTALL)


def as_mathml(formula: str, *, display: str) -> str:
    """A formula in LaTeX as an element `math`."""
    return convert(" ".join(formula.split()), display=display)


class _Displayed(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        def stashed(indent: str, formula: str) -> str:
            html = f'<div class="formula">{as_mathml(formula, display="block")}</div>'
            return f"\n{indent}{self.md.htmlStash.store(html)}\n"

        text = _DIRECTIVE.sub(lambda m: stashed(m["indent"], m["first"] + m["rest"]), "\n".join(lines))
        return _DOLLARS.sub(lambda m: stashed(m["indent"], m["body"]), text).split("\n")


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[ElementTree.Element | str, int, int]:
        return self.md.htmlStash.store(as_mathml(m.group(1), display="inline")), m.start(0), m.end(0)


class Mathematics(Extension):
    """Displayed formulas before blocks are parsed, but after fenced code is set aside; then those in a line."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the processors."""
        md.preprocessors.register(_Displayed(md), "displayed", 19)
        md.inlinePatterns.register(_Inline(r":math:`([^`]+)`", md), "math-role", 195)
        md.inlinePatterns.register(_Inline(r"(?<![\\\w$])\$([^$\s](?:[^$\n]*[^$\s])?)\$(?![\w$])", md), "math", 185)


def makeExtension(**settings: object) -> Mathematics:
    """What Python-Markdown calls."""
    return Mathematics(**settings)
