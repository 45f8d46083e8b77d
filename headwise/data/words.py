"""Word lists of the tasks: names, capitals, ordered words, and plain nouns."""


def _list(text: str) -> list[str]:
    return text.split()


NAMES = _list(
    "Mary John James Anna David Tom Alice Bob Emma Jack Laura Peter Paul Susan Mark Sarah Kate Adam Simon Ruth Helen "
    "Frank George Henry Lucy Martin Jane Robert William Thomas Richard Charles Daniel Michael Kevin Brian Steven "
    "Edward Jason Ryan Eric Andrew Joseph Samuel Benjamin Alex Max Leo Oliver Sophie Maria Julia Rachel Rebecca Amy "
    "Lisa Karen Linda Nancy Carol"
)

PLACES = _list("store park school office garden station market library kitchen hospital museum restaurant")
GIFTS = _list("drink book ring letter ball basket necklace bottle gift key map coat")

NOUNS = _list(
    "dog cat sun tree house river stone bread milk chair table window door horse bird fish flower mountain cloud rain "
    "snow fire ship train road bridge clock lamp paper knife spoon shirt shoe hat ball drum bell queen king doctor "
    "farmer apple lemon salt sugar gold silver glass wood moon star island forest"
)

EVENTS = _list("war siege trial drought reign journey project marriage strike debate festival exhibition")
ARGUMENTS = _list(
    "load size files last path name text key value index count data mode label width height offset limit target "
    "source model config query user group order page line color node image state event time parent field"
)
FUNCTIONS = _list("port run make build open read send find move check sort merge write update")
COLOURS = _list("red blue green yellow black white orange purple pink brown")
OBJECTS = _list("cup pen hat book bag ball key box lamp chair shirt coin plate spoon table clock")
GROCERIES = _list(
    "milk bread soap paper rice salt sugar butter cheese fish fruit tea coffee flour honey juice water meat wine oil "
    "corn glue tape string rope paint chalk wool"
)
WOMEN = _list(
    "Mary Anna Alice Emma Laura Susan Sarah Kate Ruth Helen Lucy Jane Sophie Maria Julia Rachel Rebecca Amy Lisa Karen "
    "Linda Nancy Carol"
)
MEN = _list(
    "John James David Tom Bob Jack Peter Paul Mark Adam Simon Frank George Henry Martin Robert William Thomas Richard "
    "Charles Daniel Michael Kevin Brian Steven"
)
ROLES = _list("friend cook teacher neighbour singer dancer doctor writer driver player guest host")

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Scotland": "Edinburgh", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik", "Poland": "Warsaw", "Austria": "Vienna",
    "Hungary": "Budapest", "Romania": "Bucharest", "Bulgaria": "Sofia", "Greece": "Athens", "Turkey": "Ankara",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Belarus": "Minsk", "Latvia": "Riga", "Estonia": "Tallinn",
    "Lithuania": "Vilnius", "Belgium": "Brussels", "Switzerland": "Bern", "Croatia": "Zagreb", "Serbia": "Belgrade",
    "Albania": "Tirana", "Slovenia": "Ljubljana", "Slovakia": "Bratislava", "Armenia": "Yerevan", "Georgia": "Tbilisi",
    "China": "Beijing", "Japan": "Tokyo", "India": "Delhi", "Nepal": "Kathmandu", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Malaysia": "Kuala Lumpur", "Bangladesh": "Dhaka",
    "Pakistan": "Islamabad", "Afghanistan": "Kabul", "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus",
    "Lebanon": "Beirut", "Jordan": "Amman", "Egypt": "Cairo", "Libya": "Tripoli", "Tunisia": "Tunis",
    "Morocco": "Rabat", "Algeria": "Algiers", "Sudan": "Khartoum", "Ethiopia": "Addis Ababa", "Kenya": "Nairobi",
    "Uganda": "Kampala", "Rwanda": "Kigali", "Ghana": "Accra", "Nigeria": "Abuja", "Senegal": "Dakar",
    "Zimbabwe": "Harare", "Zambia": "Lusaka", "Angola": "Luanda", "Canada": "Ottawa", "Cuba": "Havana",
    "Jamaica": "Kingston", "Colombia": "Bogota", "Venezuela": "Caracas", "Ecuador": "Quito", "Peru": "Lima",
    "Chile": "Santiago", "Argentina": "Buenos Aires", "Uruguay": "Montevideo", "Australia": "Canberra",
    "Mongolia": "Ulaanbaatar", "Philippines": "Manila",
}  # fmt: skip

ORDERED = {
    "days": _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "months": _list("January February March April May June July August September October November December"),
    "words": _list("one two three four five six seven eight nine ten eleven twelve"),
    "ordinals": _list("first second third fourth fifth sixth seventh eighth ninth tenth"),
    "numbers": [str(i) for i in range(1, 21)],
    "letters": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
