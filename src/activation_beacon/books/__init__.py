"""The book that the demo reads: a whole public-domain work, longer than the default model's 8,192 positions."""

from importlib import resources

DEMO_BOOK_TITLE = "Little Wizard Stories of Oz"
DEMO_BOOK_AUTHOR = "L. Frank Baum"
DEMO_BOOK_FILE = "little-wizard-stories-of-oz.txt"
# The answers to the second and third stand beyond the default model's last position.
DEMO_QUESTIONS = (
    "What are the names of the three mischievous Imps?",
    "What were the Sawhorse's legs shod with?",
    "In what land does the Tin Woodman live?",
)
DEMO_ANSWERS = ("Olite, Udent and Ertinent", "plates of gold", "the Winkie Land")


def read_demo_book() -> str:
    """Return the book's whole text."""
    return resources.files(__name__).joinpath(DEMO_BOOK_FILE).read_text(encoding="utf-8")
