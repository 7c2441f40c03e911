r"""Final answers of mathematical problems: find the boxed one in a text, and compare two of them.

Both answers are brought to one plain spelling: LaTeX's spacing, sizes and styles go, \frac, \sqrt and braces
are written out. Then they are split into the elements of a list, tuple, set, interval or union, and compared
element by element: numbers as exact fractions, all else as text. Nothing is evaluated beyond fractions, mixed
numbers, decimals, a power of two whole numbers and a * 10^n. No algebra: x+1 is not 1+x.

What is ambiguous is decided so:
- "1,234" is the number 1234, "1, 234" a list. Between brackets a comma always separates: (1,234) is the pair
  of 1 and 234.
- Lists without brackets are solution sets: their order does not matter, and {1,2} is the same. Tuples and
  intervals are compared in order.
- A unit, a degree sign or "x =" may be left out, but two that are written must agree: 5 cm is 5, and is not
  5 m.
- 50% is 1/2, and also the number 50 with its sign left out: questions that ask for a percentage are answered
  in both ways.
- A decimal is what is written: 0.333 is not 1/3.

Bounded on any input: an answer of more than LIMIT characters only equals itself, recursion is at most DEPTH
deep, numbers have at most BITS bits. Nothing is ever passed to eval.
"""
import re
from fractions import Fraction
from typing import NamedTuple

LIMIT, DEPTH, BITS = 2000, 16, 10_000  # characters of an answer; brackets in brackets; bits of a number
UNORDERED = 64  # elements that are matched in any order; a longer set is compared in order

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*"
                 r"(\{|\\[A-Za-z]+(?:\{[^{}]*\})*|[^\s{}$\\]+)?|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} with balanced braces holds, or the word behind one without
    braces; None if there is none."""
    found, at = None, -1
    stack = []  # the open braces: (start, end) of \boxed{ for one that belongs to a box, else None
    for match in BOX.finditer(text):
        if match[1] == "{":
            stack.append(match.span())
        elif match[0] == "{":
            stack.append(None)
        elif match[0] == "}" and stack and (box := stack.pop()) and box[0] > at:
            at, found = box[0], text[box[1] : match.start()].strip()
        elif match[1]:
            at, found = match.start(), match[1].rstrip(".,;:")
    return found


def response(canvas: str, solution: str, given: str) -> str:
    """What the model wrote into a decoded canvas: all behind the prompt, up to the first end token. The end
    token is the one that `solution` ends in."""
    end = re.search(r"<[^<>\s]+>$", solution)
    written = canvas[len(given.rstrip("_")) :]
    return written.split(end[0])[0] if end else written


def check(filled: str, solution: str, given: str) -> bool:
    """The boxed answer of the response is the solution's: `check` of every data set with boxed answers."""
    written, right = (boxed(response(canvas, solution, given)) for canvas in (filled, solution))
    return written is not None and right is not None and same_answer(written, right)


def same_answer(a: str, b: str) -> bool:
    """Whether two final answers are the same, by the rules above. Symmetric; never raises."""
    a, b = a.strip(), b.strip()
    return a == b or max(len(a), len(b)) <= LIMIT and _same(_value(_plain(a)), _value(_plain(b)))


# ---- one plain spelling
# Signs of our own: ⦃ ⦄ a set's braces, ‹ › words, ⟦p/q⟧ a fraction written with \frac, ; a comma before a
# space.

SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "\u00a0": " ", "~": " ",
    **dict.fromkeys("⦃⦄‹›⟦⟧"),  # None: where an answer holds one of our own signs, it is taken out
})  # fmt: skip
# What may be a unit without \text. Two other letters can be a product.
WORDS = r"(?:[A-Za-z]{3,}|cm|mm|km|kg|ft|in|mi|lb|oz|mL|hr)"
RULES = [(re.compile(pattern, re.ASCII), new) for pattern, new in [
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|,\\,)(?=\d{3}(?!\d))", ""),  # thousands that cannot be anything else
    (r"\\\\", "↵"), (r"\\[,;: ]|\\q?quad(?![A-Za-z])", " "),
    (r"\\!|\\(?:displaystyle|textstyle)(?![A-Za-z])", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""), (r"\\?\$|\\[()\[\]]", ""),
    (r"\\\{|\\lbrace(?![A-Za-z])", "⦃"), (r"\\\}|\\rbrace(?![A-Za-z])", "⦄"), (r"\\%", "%"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\\sqrt(?![A-Za-z])|(?<![A-Za-z\\])sqrt(?![A-Za-z])", "√"),
    (r"\\pi(?![A-Za-z])|(?<![A-Za-z\\])pi(?![A-Za-z])", "π"), (r"\\infty(?![A-Za-z])", "∞"),
    (r"\\(?:cdot|times)(?![A-Za-z])", "*"), (r"\\cup(?![A-Za-z])", "∪"), (r"\\in(?![A-Za-z])", "∈"),
    (r"\\pm(?![A-Za-z])", "±"), (r"\\(?:emptyset|varnothing)(?![A-Za-z])", "∅"),
    (r"\\leq?(?![A-Za-z])|<=", "≤"), (r"\\geq?(?![A-Za-z])|>=", "≥"), (r"\\neq?(?![A-Za-z])|!=", "≠"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])", "°"),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|operatorname)\s*\{([^{}]*)\}", r"‹\1›"),
    (r"(?<!\d)‹\s*(\([A-Za-z]\)|[+-]?\d[\d,./]*)\s*›", r"\1"),
    (r"\s+", " "), (r"^ | $|(?<!\.)\. ?$", ""), (r",? ?‹ ?(?:and|or) ?› ?|,? (?:and|or) ", "; "),
    (rf"(?<=[\d)}}]) ({WORDS}(?: {WORDS})*)(?= ?(?:\^|[,;)\]⦄]|$))", r"‹\1›"),
    (r"‹ ?percent ?›", "%"), (r"‹ ?degrees? ?›", "°"),
    (r"(?<![\d./^])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1⟦\2/\3⟧"),  # 1 1/2
    (r", ", ";"), (r"(?<!\d) | (?!\d)", ""),  # a space between digits stays: "1 2" is not 12
]]  # fmt: skip
ARGUMENT = r" ?(?:\{((?:(?!\\frac)[^{}])*)\}|(\d|[A-Za-zπ]))"
FRAC = re.compile(rf"\\frac{ARGUMENT}{ARGUMENT}", re.ASCII)
ROOT = re.compile(r"√(\[[^\[\]]*\])?(?:\{([^{}]*)\}|(\d+|[A-Za-zπ]))", re.ASCII)
POWER = re.compile(r"([\^_])(?:\{([^{}]*)\}|\((-?\d+|[A-Za-zπ])\))", re.ASCII)
ATOM = re.compile(r"-?\d+|\d*\.\d+|[A-Za-zπ∞]|⟦[^⟦⟧]*⟧", re.ASCII)
TERM = re.compile(rf"{ATOM.pattern}|√\([^()]*\)|[A-Za-zπ]\^\d+", re.ASCII)  # needs no brackets in a fraction


def _plain(text: str) -> str:
    text = text.translate(SIGNS)
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    for _ in range(DEPTH):  # the innermost braces first
        before = text
        text = ROOT.sub(lambda m: f"√{m[1] or ''}({m[2] or m[3] or ''})", text)
        text = FRAC.sub(lambda m: _fraction(m[1] or m[2] or "", m[3] or m[4] or ""), text)
        text = POWER.sub(lambda m: m[1] + _group(m[2] if m[3] is None else m[3]), text)
        if text == before:  # no command is left that could own the braces
            text = re.sub(r"\{([^{}]*)\}", lambda m: _braces(m[1]), text)
        if text == before:
            break
    return text


def _braces(text: str) -> str:
    """What braces that belong to no command mean: a set that was not escaped, or a group."""
    return f"⦃{text}⦄" if "," in text or ";" in text else _group(text)


def _group(text: str, single: re.Pattern = ATOM) -> str:
    return text if single.fullmatch(text) else f"({text})"


def _fraction(above: str, below: str) -> str:
    p, q = _number(above), _number(below)
    if p is None or not q:
        return f"⟦{_group(above, TERM)}/{_group(below, TERM)}⟧"
    return f"⟦{(p / q).numerator}/{(p / q).denominator}⟧" if _bounded(p / q) else f"⟦({above})/({below})⟧"


# ---- comparison

NAME = re.compile(r"((?:[A-Za-z]|\\[A-Za-z]+)(?:_\w)?(?:\([A-Za-z]\))?)[=∈]([^=]*)", re.ASCII)
NUMBER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
SCIENTIFIC = re.compile(rf"({NUMBER})(?:(?:e|E|\*10\^)([+-]?\d{{1,4}}))?", re.ASCII)
MIXED = re.compile(r"(\d*)⟦(-?\d+)/(\d+)⟧", re.ASCII)
RATIO = re.compile(rf"({NUMBER})/(?:({NUMBER})|\(-({NUMBER})\))", re.ASCII)
RAISED = re.compile(r"(\d{1,20})\^(-?\d{1,4})", re.ASCII)
UNIT = re.compile(r"([^‹›]*?)((?:‹[^‹›]*›(?:\^-?[1-3])?[/*]?)+|[%°]|)")


class Value(NamedTuple):
    """An answer: a leaf, or the elements of a list."""

    name: str  # x, of x = 5
    kind: str  # "" of a leaf, the pair of brackets, "{}" of a set or bare list, "∪" of a union
    elements: list["Value"]
    number: tuple[Fraction, str] | None  # a leaf's number and unit, if it is one
    text: str  # a leaf's text


def _value(text: str, depth: int = DEPTH) -> Value:
    match = NAME.fullmatch(text)
    name, text = (match[1], match[2]) if match else ("", text)
    kind, elements = "", []
    for _ in range(depth):
        if _quantity(text):
            break
        if len(elements := _split(text, "∪")) > 1:
            kind = "∪"
            break
        pieces = _split(text, ";")
        elements = [x for piece in pieces for x in ([piece] if _quantity(piece) else _split(piece, ","))]
        if len(elements) > 1:
            kind = "{}"
            break
        if text[:1] not in tuple("([⦃") or text[-1:] not in tuple(")]⦄") or not _closes_last(text):
            break
        brackets, text = text[0] + text[-1], text[1:-1]
        elements = [x for piece in _split(text, ";") for x in _split(piece, ",")]
        if brackets != "()" or len(elements) > 1:
            kind = "{}" if brackets == "⦃⦄" else brackets
            break  # else (5), which is 5
    if kind:
        return Value(name, kind, [_value(element, depth - 1) for element in elements], None, "")
    return Value(name, "", [], _quantity(text), _text(text))


def _same(a: Value, b: Value) -> bool:
    if a.name and b.name and a.name != b.name or a.kind != b.kind or len(a.elements) != len(b.elements):
        return False
    if not a.kind:
        if a.number and b.number:
            return _same_number(*a.number, *b.number)
        return not a.number and not b.number and a.text == b.text
    if a.kind not in ("{}", "∪") or len(a.elements) > UNORDERED:
        return all(map(_same, a.elements, b.elements))
    left = list(b.elements)
    for x in a.elements:
        partner = next((k for k, y in enumerate(left) if _same(x, y)), None)
        if partner is None:
            return False
        left.pop(partner)
    return True


def _same_number(x: Fraction, unit: str, y: Fraction, other: str) -> bool:
    if (unit, other) in (("%", ""), ("", "%")) and x * (100 if other else 1) == y * (100 if unit else 1):
        return True
    return x == y and (unit == other or not unit or not other)


def _depths(text: str) -> list[int]:
    """How many brackets are open behind every character. Any closing one closes: an interval may be [1,2)."""
    depths, depth = [], 0
    for c in text:
        depth += (c in "([{⦃⟦‹") - (c in ")]}⦄⟧›")
        depths.append(depth)
    return depths


def _closes_last(text: str) -> bool:
    depths = _depths(text)
    return depths[-1] == 0 and 0 not in depths[:-1]


def _split(text: str, separator: str) -> list[str]:
    """The pieces of a text between the separators that are in no bracket."""
    pieces, start = [], 0
    for at, depth in enumerate(_depths(text)):
        if depth == 0 and text[at] == separator:
            pieces.append(text[start:at])
            start = at + 1
    return [*pieces, text[start:]]


def _text(text: str) -> str:
    """A leaf as it is compared when it is no number."""
    text = re.sub(r"[‹›]|^\+|\*(?!\d)", "", text)
    for _ in range(DEPTH):  # \frac{π}{2} is π/2, but \frac{1}{2}x is not 1/2x
        text = re.sub(r"(?<![\w.)π^!√⟧\]])⟦([^⟦⟧]*)⟧(?![\w.(π^!√⟦])", r"\1", text)
    word = re.fullmatch(r"[A-Za-z]{2,}", text)
    return text.casefold() if word else text.replace("⟦", "(").replace("⟧", ")")


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Number and unit ("" if it has none)."""
    match = UNIT.fullmatch(text)
    value = _number(match[1]) if match else None
    return None if value is None else (value, re.sub(r"[‹›]", "", match[2]).lower().rstrip("s"))


def _number(text: str) -> Fraction | None:
    """The exact value of a number as it is written; None if it is none, or has more than BITS bits."""
    sign, text = (-1 if text[:1] == "-" else 1), text[text[:1] in ("+", "-") :]
    value = None
    if m := SCIENTIFIC.fullmatch(text):
        n = int(m[2] or 0)
        value = _decimal(m[1]) * Fraction(10) ** n if abs(n) <= 1000 else None
    elif (m := MIXED.fullmatch(text)) and int(m[3]) and not (m[1] and int(m[2]) < 0):
        value = int(m[1] or 0) + Fraction(int(m[2]), int(m[3]))
    elif (m := RATIO.fullmatch(text)) and _decimal(m[2] or m[3]):
        value = _decimal(m[1]) / _decimal(m[2] or m[3]) * (-1 if m[3] else 1)
    elif (m := RAISED.fullmatch(text)) and int(m[1]) and abs(int(m[2])) <= 1000:
        value = Fraction(int(m[1])) ** int(m[2])
    return sign * value if value is not None and _bounded(value) else None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _bounded(value: Fraction) -> bool:
    return max(value.numerator.bit_length(), value.denominator.bit_length()) <= BITS
