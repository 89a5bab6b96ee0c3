"""What an evaluation draws by itself: studio prompts to learn, and others that shall not change."""

from sdkit.mini.catalogue import BACKGROUNDS, BASE_BACKGROUNDS, COLOURS, KINDS, Product

PAIRS = tuple((kind, colour) for kind in KINDS for colour in COLOURS)


def studio_prompts() -> tuple[str, ...]:
    """Every colour of every kind on pure white: 32 prompts."""
    return tuple(
        Product(kind, colour, index % 2 == 0, "white").caption()
        for index, (kind, colour) in enumerate(PAIRS)
    )


def base_prompts() -> tuple[str, ...]:
    """Every colour of every kind once, on the four backgrounds of the base model in turn: 32.

    Within a kind each background meets two colours, and over the kinds each colour meets each.
    """
    count = len(BASE_BACKGROUNDS)
    return tuple(
        Product(
            kind, colour, index % 2 == 0, BASE_BACKGROUNDS[(index + index // len(COLOURS)) % count]
        ).caption()
        for index, (kind, colour) in enumerate(PAIRS)
    )


def find_product(prompt: str) -> Product | None:
    """Returns the product that a prompt of the catalogue asks for, or None if it is not such."""
    found = {}
    for name, words in {
        "kind": {kind: kind for kind in KINDS},
        "colour": {colour: f"{colour} " for colour in COLOURS},
        "background": BACKGROUNDS,
    }.items():
        # "on white" names no colour of a shoe: the phrase is cut off.
        text = prompt.partition(" on ")[0] if name == "colour" else prompt
        matches = [key for key, phrase in words.items() if phrase in text]
        if len(matches) != 1:
            return None
        found[name] = matches[0]
    return Product(leather="leather" in prompt, **found)
