"""Every name the playground knows: what can be drawn, and the words tasks answer with."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "green": (20, 165, 60),
    "blue": (50, 100, 255),
    "yellow": (245, 205, 0),
    "purple": (150, 50, 200),
    "orange": (255, 125, 10),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (18, 18, 28),
    "grey": (165, 175, 190),
    "sandy": (228, 208, 170),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
PATTERNS = ("columns", "rows", "tiles", "dots", "mesh", "rings")
WORDS = (
    "cat", "dog", "sun", "map", "tea", "bus", "hat", "key",
    "cup", "pen", "jam", "owl", "fox", "log", "net", "ice",
)  # fmt: skip
COUNT_WORDS = ("one", "two", "three", "four", "five")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "ABCDEF"
SIDES = ("left", "right", "top", "bottom")

# Object classes of the naming task: every shape and every pattern has one.
CLASS_OF_SHAPE = {
    "circle": "Ball",
    "square": "Brick",
    "triangle": "Tent",
    "cross": "Windmill",
    "star": "Starfish",
}
CLASS_OF_PATTERN = {
    "columns": "Zebra",
    "rows": "Ladder",
    "tiles": "Chessboard",
    "dots": "Ladybird",
    "mesh": "Fence",
    "rings": "Target",
}

# What the question-type tasks know about a colour, a shape or a background.
FRUIT_OF = {
    "red": "apple",
    "green": "pear",
    "blue": "berry",
    "yellow": "banana",
    "purple": "grape",
    "orange": "peach",
}
GEM_OF = {
    "red": "ruby",
    "green": "emerald",
    "blue": "sapphire",
    "yellow": "amber",
    "purple": "amethyst",
    "orange": "topaz",
}
ACTION_OF = {"circle": "roll", "square": "stack", "triangle": "point", "cross": "turn", "star": "shine"}
TYPE_OF = {"circle": "round", "square": "blocky", "triangle": "pointed", "cross": "blocky", "star": "pointed"}
CAUSE_OF = {"white": "snow", "black": "night", "grey": "rain", "sandy": "desert"}


def every_answer_word() -> tuple[str, ...]:
    """All words that occur in an answer of either benchmark, in a fixed order, without repeats."""
    groups = (
        COLOURS, BACKGROUNDS, SHAPES, PATTERNS, WORDS, COUNT_WORDS, DIGIT_WORDS, SIDES, LETTERS,
        CLASS_OF_SHAPE.values(), CLASS_OF_PATTERN.values(), FRUIT_OF.values(), GEM_OF.values(),
        ACTION_OF.values(), TYPE_OF.values(), CAUSE_OF.values(),
        ("above", "below", "middle", "yes", "no", "unanswerable"),
    )  # fmt: skip
    return tuple(dict.fromkeys(word for group in groups for word in group))
