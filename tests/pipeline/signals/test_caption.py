"""Language on a table of real-looking captions, short ones above all; file names, addresses, advertisements."""

from __future__ import annotations

import pytest

from pipeline.miniweb import words
from pipeline.signals import Picture, SignalOptions
from pipeline.signals.caption import CaptionFigures, filename_like, load, normal, spam_like

P_EN = 0.1  # the threshold that the shipped recipes use

SCENES = """a red circle above a blue star|a small green square|Two Large Purple Hexagons|A RED CIRCLE|Blue Star
a tiny striped triangle left of a huge yellow ring|a picture of a dotted orange cross on a white background"""
ENGLISH = """cupcakes|red car|sunset|a dog|vintage lamp|Paris at night|black leather jacket|kitchen
lighthouse in fog|mountain bike|chocolate cake with berries|wedding dress|cat|Toyota Corolla 2015|iPhone 12 case|beach
tomato soup|old wooden door|grandfather clock|axe|teddy bear|plunger|label|dagger knife|minibus|Grand Canyon
New York skyline|Samsung Galaxy S9|silver ring|tiger|rose|Santa Claus|t-rex|Men's Running Shoes|Leather Sofa
Wooden Table|Canon EOS 5D Mark IV|BMW X5|Bohemian Rug 5x8|Eiffel Tower|sushi platter|Adidas logo|barn owl|PINK FLAMINGO
Star Wars poster|espresso machine|pizza margherita|spaghetti carbonara|kimono|St. Peter's Basilica, Rome
IKEA Billy bookcase|Porsche 911 Turbo|cappuccino|Nike Air Max 90"""
SHORT_FOREIGN = """roter Kreis über blauem Stern|Hund am Strand|rotes Auto|schwarze Lederjacke|Schokoladenkuchen
Haus am See|Sonnenuntergang|alte Lampe|weiße Katze|Berge im Winter|maison ancienne|chat noir|voiture rouge
gâteau au chocolat|coucher de soleil|plage de sable blanc|robe de mariée|chien dans la neige|Tour Eiffel la nuit
fleurs sauvages|perro rojo|casa antigua|coche azul|gato negro en la ventana|puesta de sol|pastel de chocolate
zapatos de mujer|círculo rojo sobre estrella azul|montañas nevadas|vestido de novia|gatto nero|casa sul mare
torta al cioccolato|macchina rossa|tramonto a Roma|cane nel parco|cachorro preto|praia ao pôr do sol|bolo de chocolate
carro vermelho|rode fiets|zwarte kat|huis aan het water|czerwony samochód|czarny kot|stary dom|kırmızı araba|siyah kedi
красная машина|чёрный кот|赤い車|黒い猫
红色汽车|黑猫|سيارة حمراء|قطة سوداء|빨간 자동차|röd bil|svart katt|punainen auto"""


def captions(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


@pytest.fixture(scope="module")
def signal() -> CaptionFigures:
    return load(SignalOptions())


def figures(signal: CaptionFigures, caption: str) -> dict[str, object]:
    seen = signal.look(Picture({"caption": caption}, None))
    assert seen is not None
    return seen


def passing(signal: CaptionFigures, texts: list[str]) -> list[str]:
    table = signal.columns([figures(signal, text) for text in texts])
    return [text for text, p_en in zip(texts, table["p_en"].to_pylist(), strict=True) if p_en >= P_EN]


def test_descriptions_of_scenes_pass_in_any_case(signal: CaptionFigures) -> None:
    texts = captions(SCENES)
    every = [form for text in texts for form in (text, text.lower(), text.upper(), text.title(), f"  {text}\n")]
    assert passing(signal, every) == every


def test_hard_short_english_captions_mostly_pass(signal: CaptionFigures) -> None:
    texts = captions(ENGLISH)
    assert len(texts) >= 50
    assert len(passing(signal, texts)) >= 0.9 * len(texts)


def test_short_foreign_captions_mostly_fail(signal: CaptionFigures) -> None:
    texts = captions(SHORT_FOREIGN)
    assert len(texts) == 60
    assert len(passing(signal, texts)) <= 0.2 * len(texts)


@pytest.mark.parametrize("language", sorted(words.FOREIGN))
def test_foreign_sentences_fail_and_are_named(signal: CaptionFigures, language: str) -> None:
    texts = list(words.FOREIGN[language])
    assert passing(signal, texts) == []
    labels = [figures(signal, text)["lang"] for text in texts]
    assert labels.count(language) >= 3


def test_case_space_width_and_stops_change_nothing(signal: CaptionFigures) -> None:
    plain = figures(signal, "a red circle above a blue star")
    for same in (
        "A Red Circle Above A Blue Star",
        "a red\tcircle\n above a  blue star ",
        "ａ red circle above a blue star",
        "“A red circle” (above a blue star).",
    ):
        assert figures(signal, same)["p_en"] == plain["p_en"]


def test_p_en_is_a_probability_for_anything(signal: CaptionFigures) -> None:
    for text in ("1234", "!!!", "🦊", "\ud800 \x00", "a" * 1_000_000, "word " * 200_000, "中" * 100_000):
        assert 0 <= float(str(figures(signal, text)["p_en"])) <= 1


def test_counts_and_missing_captions(signal: CaptionFigures) -> None:
    seen = figures(signal, "  two  words\n")
    assert (seen["words"], seen["chars"]) == (2, 10)
    for nothing in (None, "", " \n\t"):
        assert signal.look(Picture({"caption": nothing}, None)) is None
    assert signal.columns([seen]).schema == signal.schema()


def test_normal_is_a_fixed_point() -> None:
    for text in ("ﬁne  ½\u200bday\x00end", "Ａ\u3000Ｂ", "plain"):
        assert normal(normal(text)) == normal(text)
    assert normal("a\x00b\u200bc\u3000 d") == "a bc d"


NAMES = """IMG_0042.JPG|DSC00012|P1020304.JPG|image007.png|Screenshot_2019-03-04-101112.png|IMG-20180101-WA0007.jpg
photo_3_final_v2.jpeg|scan0007.tif|my holiday.jpeg|untitled 3|0042|12-34|product-image-2301|black_cat|a1b2c3d4e5f60718
http://example.org/a/b|www.example.org/cat|8f14e45f-ceea-467f-9b1c-1c8f3b2a9d10
WhatsApp Image 2020-01-02 at 10.11.12|***"""
DESCRIPTIONS = """cat|black-and-white|t-rex|a red circle above a blue star|Nike Air Max 90|photo|image of a dog
P-51 Mustang
BMW X5|photo 51 by Rosalind Franklin|picture of 3 cats|F-16|1969 Ford Mustang|2 dead frogs|St. Peter's|赤い車|état
COVID-19
a file named IMG_0042.JPG on a desk|image 3 of a series about dogs"""


def test_file_names_and_no_descriptions() -> None:
    found = [text.format(n=n) for text in words.FILENAMES for n in (0, 7, 123)]
    assert [text for text in [*captions(NAMES), *found] if not filename_like(normal(text))] == []
    assert [text for text in captions(DESCRIPTIONS) if filename_like(normal(text))] == []


ADVERTS = """Click here to see more|FREE SHIPPING on all orders|Image not available|no image|Lorem ipsum dolor sit amet
cheap cheap cheap cheap shoes cheap|50% off, only $20|Buy it now|Best prices guaranteed|visit our website www.foo.com
Call +1 555 010 999 for a great offer|photo unavailable|Please enable JavaScript|loading..."""
HONEST = """a man buys apples at the market|a cat sits in a shopping cart|Sale sign in a shop window
a $100 bill on a table
people queue for the best pizza in town|casino at night, Las Vegas|a discount store in Tokyo|a photo of a phone
Click beetle on a leaf|a free bird|the winner of the race|an old coupon|photo from the collection of the museum
two and two and two are six
penguin, tux, animal, linux|jean.victor@gmail.com, animal, bird
happy birthday!
poster of the film Wall Street|a woman calls her friend|Open for business
Subscribe button icon|a red circle above a blue star and a green square above a red star"""


def test_advertisements_and_honest_captions() -> None:
    planted = [text.format(n=n) for text in words.SPAM for n in (3, 40, 777)]
    assert [text for text in [*captions(ADVERTS), *planted] if not spam_like(normal(text))] == []
    assert [text for text in captions(HONEST) if spam_like(normal(text))] == []
