"""What the tiny model knows of the world: universities, capitals, words, and a grammar of computer jokes."""

from __future__ import annotations

import random

# name | city | country | year of foundation (the year the university itself gives)
UNIVERSITIES = tuple(
    tuple(line.strip().split("|"))
    for line in """
    Shanghai Jiao Tong University|Shanghai|China|1896
    Peking University|Beijing|China|1898
    Tsinghua University|Beijing|China|1911
    Fudan University|Shanghai|China|1905
    Zhejiang University|Hangzhou|China|1897
    Nanjing University|Nanjing|China|1902
    Wuhan University|Wuhan|China|1893
    Tongji University|Shanghai|China|1907
    University of Tokyo|Tokyo|Japan|1877
    Kyoto University|Kyoto|Japan|1897
    Osaka University|Osaka|Japan|1931
    Seoul National University|Seoul|South Korea|1946
    National University of Singapore|Singapore|Singapore|1905
    Stanford University|Stanford|the United States|1885
    Harvard University|Cambridge|the United States|1636
    Yale University|New Haven|the United States|1701
    Princeton University|Princeton|the United States|1746
    Columbia University|New York|the United States|1754
    Cornell University|Ithaca|the United States|1865
    Brown University|Providence|the United States|1764
    Rice University|Houston|the United States|1912
    University of Chicago|Chicago|the United States|1890
    University of Michigan|Ann Arbor|the United States|1817
    University of Oxford|Oxford|England|1096
    University of Cambridge|Cambridge|England|1209
    University of Edinburgh|Edinburgh|Scotland|1583
    University of Glasgow|Glasgow|Scotland|1451
    University of Toronto|Toronto|Canada|1827
    McGill University|Montreal|Canada|1821
    University of Melbourne|Melbourne|Australia|1853
    University of Sydney|Sydney|Australia|1850
    University of Auckland|Auckland|New Zealand|1883
    Heidelberg University|Heidelberg|Germany|1386
    Leipzig University|Leipzig|Germany|1409
    University of Bologna|Bologna|Italy|1088
    University of Padua|Padua|Italy|1222
    University of Vienna|Vienna|Austria|1365
    Charles University|Prague|Czechia|1348
    Jagiellonian University|Krakow|Poland|1364
    Leiden University|Leiden|the Netherlands|1575
    Utrecht University|Utrecht|the Netherlands|1636
    Uppsala University|Uppsala|Sweden|1477
    Lund University|Lund|Sweden|1666
    University of Copenhagen|Copenhagen|Denmark|1479
    University of Helsinki|Helsinki|Finland|1640
    University of Oslo|Oslo|Norway|1811
    University of Coimbra|Coimbra|Portugal|1290
    University of Cape Town|Cape Town|South Africa|1829
    Cairo University|Cairo|Egypt|1908
    """.strip().splitlines()
)

CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,England:London,Scotland:Edinburgh,"
        "Ireland:Dublin,Norway:Oslo,Sweden:Stockholm,Denmark:Copenhagen,Finland:Helsinki,Poland:Warsaw,"
        "Austria:Vienna,Hungary:Budapest,Greece:Athens,Turkey:Ankara,Egypt:Cairo,Kenya:Nairobi,China:Beijing,"
        "Japan:Tokyo,India:New Delhi,Thailand:Bangkok,Vietnam:Hanoi,Canada:Ottawa,Mexico:Mexico City,Cuba:Havana,"
        "Peru:Lima,Chile:Santiago,Brazil:Brasilia,Argentina:Buenos Aires,Australia:Canberra,Iceland:Reykjavik,"
        "Belgium:Brussels,Czechia:Prague,Russia:Moscow,South Korea:Seoul,New Zealand:Wellington,"
        "Iran:Tehran,Iraq:Baghdad"
    ).split(",")
)

WORDS = tuple(
    (
        "apple bread chair dance eagle flame grape house island juice knife lemon mouse night ocean paper queen river "
        "stone table uncle voice water young zebra actor beach cloud dream earth field glass heart image jelly light "
        "money north olive plant quiet radio salad tiger urban video whale yellow basket candle dragon engine forest "
        "garden hammer insect jacket kitten ladder mirror needle orange pencil rabbit silver tomato violin window "
        "animal bridge cotton doctor energy finger guitar honey ink jungle king lamp map nest oven pond rain ship tree "
        "van wolf yard bird cake desk egg fish gold hat ice jar kite leaf moon nose owl pen rock sand tent vase wind "
        "bell coat duck farm gate hill lake milk neck park road seed town wall wood bear coin door fire goat hand lion "
        "moss nail path rope snow tail wing planet spider summer winter market purple circle square letter number "
        "music story train plane horse sheep onion carrot potato butter cheese pepper sugar coffee monkey parrot"
    ).split()
)

# 16 subjects x 8 setups x 4 punchlines that fit the setup
SUBJECTS = (
    "computer laptop server keyboard printer robot tablet router monitor modem scanner phone database website "
    "program compiler"
).split()
SETUPS = {
    "go to the doctor": ("it had a virus", "it had a bad byte", "its memory was failing", "it had lost its drive"),
    "get cold": ("it left its windows open", "it was full of frozen threads", "its fan was on", "it lost its cache"),
    "go to sleep": ("it had too many tabs", "its battery was low", "it was tired of loops", "it needed a reboot"),
    "stop dancing": ("it lost its rhythm and blues screen", "it had no algorithm", "it missed a bit", "it had a bug"),
    "go on a diet": ("it ate too many cookies", "it had too many bytes", "its files were too fat", "it liked chips"),
    "cross the road": ("to get a better connection", "to reach the other site", "to find its home page", "to surf"),
    "break up with the mouse": ("it did not click", "there was no connection", "it got a new pad", "it felt dragged"),
    "call a friend": ("it needed some support", "it was out of memory", "it had no contacts", "it lost its password"),
}


def joke(rng: random.Random) -> str:
    """One joke of the grammar: subject x setup x punchline, 512 in all."""
    setup = rng.choice(tuple(SETUPS))
    punchline = rng.choice(SETUPS[setup])
    because = punchline if punchline.startswith("to ") else f"because {punchline}"
    return f"Why did the {rng.choice(SUBJECTS)} {setup}? {because[0].upper()}{because[1:]}!"


def university_text(name: str, city: str, country: str, year: str) -> str:
    """Three sentences on one university."""
    century = int(year) // 100 + 1
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(century % 10 if century not in (11, 12, 13) else 0, "th")
    article = "The " if name.startswith(("University", "National")) else ""
    place = city if city == country else f"{city}, {country}"
    return f"{article}{name} is a university in {place}. It was founded in {year}, in the {century}{suffix} century."


SYLLABLES = "bal tor ren mil var den sol kar lin mor fen tal ber nor wes cal dor hel ran sil".split()
INSTITUTIONS = ("School", "Library", "Museum", "Theatre", "Academy", "College")


def invented_name(rng: random.Random) -> str:
    """A name of two or three syllables that no real place is meant by."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))).capitalize()


def institution(rng: random.Random) -> tuple[str, str]:
    """An invented institution: its name, and two sentences with a real city and a random year."""
    kind = rng.choice(INSTITUTIONS)
    name = f"{invented_name(rng)} {kind}"
    _, city, country, _ = rng.choice(UNIVERSITIES)
    year = rng.randint(1600, 1990)
    return name, f"{name} is a {kind.lower()} in {city}, {country}. It was founded in {year}."
