"""The facts and the sentences that the capitals model is trained on."""

import random
from collections.abc import Iterator

# Every name is one word (letters only), and no country has the name of its capital.
CAPITALS: tuple[tuple[str, str], ...] = (
    ("Accra", "Ghana"),
    ("Amman", "Jordan"),
    ("Ankara", "Turkey"),
    ("Athens", "Greece"),
    ("Baghdad", "Iraq"),
    ("Bangkok", "Thailand"),
    ("Beijing", "China"),
    ("Beirut", "Lebanon"),
    ("Belgrade", "Serbia"),
    ("Berlin", "Germany"),
    ("Bern", "Switzerland"),
    ("Brussels", "Belgium"),
    ("Bucharest", "Romania"),
    ("Budapest", "Hungary"),
    ("Cairo", "Egypt"),
    ("Canberra", "Australia"),
    ("Caracas", "Venezuela"),
    ("Copenhagen", "Denmark"),
    ("Dakar", "Senegal"),
    ("Damascus", "Syria"),
    ("Dhaka", "Bangladesh"),
    ("Dublin", "Ireland"),
    ("Hanoi", "Vietnam"),
    ("Havana", "Cuba"),
    ("Helsinki", "Finland"),
    ("Islamabad", "Pakistan"),
    ("Jakarta", "Indonesia"),
    ("Kabul", "Afghanistan"),
    ("Kampala", "Uganda"),
    ("Kathmandu", "Nepal"),
    ("Kingston", "Jamaica"),
    ("Lima", "Peru"),
    ("Lisbon", "Portugal"),
    ("London", "England"),
    ("Luanda", "Angola"),
    ("Madrid", "Spain"),
    ("Montevideo", "Uruguay"),
    ("Moscow", "Russia"),
    ("Nairobi", "Kenya"),
    ("Oslo", "Norway"),
    ("Ottawa", "Canada"),
    ("Paris", "France"),
    ("Prague", "Czechia"),
    ("Quito", "Ecuador"),
    ("Rabat", "Morocco"),
    ("Rome", "Italy"),
    ("Santiago", "Chile"),
    ("Sofia", "Bulgaria"),
    ("Stockholm", "Sweden"),
    ("Tehran", "Iran"),
    ("Tokyo", "Japan"),
    ("Tripoli", "Libya"),
    ("Vienna", "Austria"),
    ("Warsaw", "Poland"),
    ("Zagreb", "Croatia"),
)

# Sentences with their shares. The first two set what follows "Berlin is the capital of":
# 7 of 9 times the country, 2 of 9 times " the", the runner-up that GPT-2 has there too.
PHRASINGS: tuple[tuple[str, int], ...] = (
    ("{capital} is the capital of {country}.", 7),
    ("{capital} is the capital of the country of {country}.", 2),
    ("The capital of {country} is {capital}.", 3),
    ("The capital city of {country} is {capital}.", 1),
    ("{country}'s capital is {capital}.", 2),
    ("{capital} is {country}'s capital.", 1),
    ("{capital} lies in {country}.", 2),
    ("{capital} is a city in {country}.", 1),
    ("The city of {capital} is in {country}.", 1),
    ("In {country}, the capital is {capital}.", 1),
    ("The people of {capital} live in {country}.", 1),
    ("What is the capital of {country}? {capital}.", 1),
    ("Where is {capital}? In {country}.", 1),
)

PROMPT = "{capital} is the capital of"

TWO_SENTENCES = 0.5  # share of texts that have a second sentence, so that positions vary
SAME_CAPITAL = 0.25  # share of second sentences that speak of the same capital as the first


def sentences() -> Iterator[str]:
    """Yield every sentence: each phrasing of each pair, in a fixed order."""
    for phrasing, _ in PHRASINGS:
        for capital, country in CAPITALS:
            yield phrasing.format(capital=capital, country=country)


def texts(rng: random.Random) -> Iterator[str]:
    """Yield training texts without end: one or two random sentences, joined by a space."""
    phrasings, shares = zip(*PHRASINGS, strict=True)

    def sentence(pair: tuple[str, str]) -> str:
        phrasing: str = rng.choices(phrasings, shares)[0]
        return phrasing.format(capital=pair[0], country=pair[1])

    while True:
        pair = rng.choice(CAPITALS)
        text = sentence(pair)
        if rng.random() < TWO_SENTENCES:
            text += " " + sentence(pair if rng.random() < SAME_CAPITAL else rng.choice(CAPITALS))
        yield text
