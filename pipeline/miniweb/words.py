"""Captions that are no descriptions in English: other languages, advertising, file names, templates, single words."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "de": (
        "Der alte Leuchtturm steht seit über hundert Jahren am Rand der Klippe",
        "Zwei Kinder spielen am Nachmittag mit ihrem Hund im Garten",
        "Blick über die verschneiten Dächer der Altstadt am frühen Morgen",
        "Unser neues Fahrrad lehnt an der Mauer hinter dem Bahnhof",
    ),
    "fr": (
        "Une vieille maison en pierre au bord de la rivière pendant l'été",
        "Les paysans vendent leurs légumes au marché du village",
        "Trois chats endormis sur le canapé du salon de ma grand-mère",
        "Les montagnes enneigées vues depuis la fenêtre de la cuisine",
    ),
    "es": (
        "La plaza mayor del pueblo llena de gente durante las fiestas",
        "Un plato de arroz con verduras recién preparado por mi abuela",
        "Los niños juegan a la pelota en la playa al atardecer",
        "Fotografía antigua de la estación de trenes de la ciudad",
    ),
    "it": (
        "La nonna prepara la pasta fresca nella cucina della vecchia casa",
        "Una barca bianca ormeggiata nel porto davanti alla chiesa",
        "I bambini corrono nel parco con gli aquiloni colorati",
        "Veduta delle colline toscane dopo il temporale di ieri sera",
    ),
    "pt": (
        "O velho bonde amarelo sobe a ladeira cheia de turistas",
        "Minha irmã comprou flores frescas na feira de domingo",
        "Pescadores consertando as redes na praia ao amanhecer",
        "Uma xícara de café quente sobre a mesa de madeira",
    ),
    "nl": (
        "De oude molen staat al eeuwen langs het kanaal buiten het dorp",
        "Mijn broer repareert zijn fiets voor de deur van de schuur",
        "Kinderen schaatsen op het bevroren meer achter de boerderij",
        "Een kom warme erwtensoep met roggebrood op de keukentafel",
    ),
    "pl": (
        "Stary kościół na wzgórzu otoczony jesiennymi drzewami",
        "Dzieci karmią kaczki nad stawem w miejskim parku",
        "Świeżo upieczony chleb leży na drewnianym stole w kuchni",
        "Widok na ośnieżone góry z okna naszego pokoju",
    ),
    "tr": (
        "Eski balıkçı teknesi limanda güneşin batışını bekliyor",
        "Çocuklar okuldan sonra parkta top oynuyorlar",
        "Büyükannem mutfakta taze ekmek ve peynir hazırlıyor",
        "Karla kaplı dağların eteğinde küçük bir köy evi",
    ),
    "ru": (
        "Старый деревянный дом на берегу реки осенним утром",
        "Дети играют в снежки во дворе возле школы",
        "Бабушка печёт пироги с яблоками на кухне",
        "Вид на городскую площадь с крыши библиотеки",
    ),
    "ja": (
        "祖母が庭で育てた花の写真を撮りました",
        "雪の降る朝に駅前で電車を待つ人々",
        "海辺の小さな町で見つけた古い灯台です",
        "子供たちが公園で犬と遊んでいる様子",
    ),
    "zh": (
        "傍晚时分老人们在公园的湖边散步聊天",
        "妈妈在厨房里准备晚饭的新鲜蔬菜",
        "冬天的早晨村庄的屋顶上落满了白雪",
        "孩子们放学后在操场上踢足球",
    ),
    "ar": (
        "منظر المدينة القديمة عند غروب الشمس من فوق السطح",
        "الأطفال يلعبون كرة القدم في الحديقة بعد المدرسة",
        "جدتي تحضر الخبز الطازج في المطبخ كل صباح",
        "قارب صيد صغير يعود إلى الميناء في المساء",
    ),
}

SPAM = (
    "BUY NOW!!! {n}% OFF all watches, free shipping worldwide, click here http://deals{n}.example",
    "CHEAP cheap cheap!!! Best price guaranteed, order today and save ${n}",
    "Best online casino bonus {n} free spins, sign up now and win big $$$",
    "FREE DOWNLOAD full version {n} crack keygen no survey, click the link below",
    "Hot sale {n} pcs wholesale factory price, contact us on WhatsApp +1 555 01{n}",
    "Subscribe to our newsletter and get {n}% discount! Limited offer!!! www.shop{n}.example",
    "$$$ Make ${n} a day working from home, visit www.money{n}.example today $$$",
    "Add to cart | Buy {n} get 1 free | Lowest price online | Free shipping | Order now!",
)

FILENAMES = (
    "IMG_{n:04d}.JPG",
    "DSC{n:05d}.jpg",
    "P10{n:05d}.JPG",
    "image{n:03d}.png",
    "Screenshot_2019-03-04-{n:06d}.png",
    "IMG-20180{n:03d}-WA0007.jpg",
    "photo_{n}_final_v2.jpeg",
    "scan{n:04d}.tif",
)

TEMPLATES = (
    "One of the many things that we have seen on that day",
    "The view which everybody liked best of all",
)

WORDS = (
    "picture",
    "photo",
    "untitled",
    "shape",
    "drawing",
    "logo",
    "art",
    "thing",
    "home",
    "print",
    "gift",
    "icon",
)

PROSE = (
    "This picture belongs to a long story that nobody has ever finished reading.",
    "The person who wrote the page had a great deal of time and very little to say.",
    "Further down there are instructions for the garden, the kitchen and the weather.",
    "After that the same sentences come again in another order, as they often do.",
)


def prose(words: int) -> str:
    """English text of at least this many words."""
    once = sum(len(sentence.split()) for sentence in PROSE)
    return " ".join(PROSE * -(-words // once))
