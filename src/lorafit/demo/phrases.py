"""The wordings of the demonstration data: one set for the training rows, another for the test rows, nothing in common.

Patterns stand one a line. `{p}` is the product, `{ap}` with its article, `{ps}` in the plural, `{P}` with a capital;
`[...]` is left out when the message has no order number or states it elsewhere; `{o}` is the order ("order KD4821",
"#KD4821", ...); `{t}` may take a tail that says how urgent it is. A head such as `wear:` or `device,furniture:` names
the kinds of product the pattern fits, and `none:` a pattern that names no product. No pattern by itself says how urgent
it is. Short phrases stand several a line between bars. All of it is invented for this package.
"""

from dataclasses import dataclass

from lorafit.demo.patterns import TEST_PATTERNS, TRAIN_PATTERNS

KINDS = ("gadget", "appliance", "furniture", "wear", "soft", "ware")
ALIASES = {
    "device": ("gadget", "appliance"),
    "hard": ("gadget", "appliance", "furniture", "ware"),
    "cloth": ("wear", "soft"),
    "any": KINDS,
    "none": (),
}


@dataclass(frozen=True)
class Pattern:
    """One sentence or two that make an intent clear. `kinds` are the products it fits; empty: it names no product."""

    text: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Phrases:
    """Every wording that the rows of one split may use. `products` maps a name to its kind."""

    products: dict[str, str]
    patterns: dict[str, tuple[Pattern, ...]]
    cues: dict[str, tuple[str, ...]]  # whole sentences; only "high" and "low": normal is the absence of both
    tails: dict[str, tuple[str, ...]]  # the same inside a sentence
    before: tuple[str, ...]  # {n} is the order number; these come before the pattern, the next ones after it
    after: tuple[str, ...]
    no_number: tuple[str, ...]
    details: tuple[str, ...]
    greetings: tuple[str, ...]
    closings: tuple[str, ...]


def items(text: str) -> tuple[str, ...]:
    """Split at the bars."""
    return tuple(item.strip() for item in text.split("|"))


def pattern(line: str) -> Pattern:
    """Read one line: an optional head of kinds and aliases, then the text."""
    head, colon, text = line.strip().partition(": ")
    names = head.split(",")
    if not colon or not all(name in KINDS or name in ALIASES for name in names):
        return Pattern(line.strip(), KINDS)
    return Pattern(text, tuple(kind for name in names for kind in ALIASES.get(name, (name,))))


def patterns(text: str) -> tuple[Pattern, ...]:
    """Read a block of lines."""
    return tuple(pattern(line) for line in text.strip().splitlines())


def products(**kinds: str) -> dict[str, str]:
    """Turn kind="name | name" into name -> kind."""
    return {name: kind for kind, names in kinds.items() for name in items(names)}


TRAIN = Phrases(
    products=products(
        gadget="""printer | speaker | camera | tablet | doorbell | projector | router | air purifier | keyboard
            | headset | microphone | scanner | radio | record player | game console | drone | power bank | webcam
            | alarm clock | hard drive | memory card | fitness band | weather station | turntable | antenna | charger
            | amplifier | wall clock | night light | metronome
            | wireless mouse | digital scale | solar lamp | video recorder | mini synthesizer | graphics card
            | bluetooth dongle | infrared sensor""",
        appliance="""kettle | toaster | blender | heater | vacuum cleaner | coffee machine | sewing machine | iron
            | juicer | food processor | hair dryer | washing machine | tumble dryer | fridge | freezer | oven
            | waffle maker | bread maker | egg boiler | ceiling fan | humidifier | electric grill | meat slicer
            | ice maker | pressure washer | lawn mower | leaf blower | hot plate
            | cordless drill | compact stove | hand mixer | portable cooler | milk frother | yoghurt pot | robot mop
            | paint sprayer""",
        furniture="""bookcase | desk | wardrobe | bed frame | shoe rack | armchair | sideboard | sofa | dining table
            | bar stool | coffee table | nightstand | dresser | office chair | bunk bed | garden chair | hammock
            | mirror | magazine rack | room divider | footstool | filing cabinet | rocking chair | wine rack
            | corner bookshelf | high chair | folding ladder | window seat | corner lamp | swivel stool
            | storage trunk""",
        wear="""jacket | sweater | raincoat | dress | shirt | cardigan | coat | vest | beanie | blouson | tracksuit
            | bathrobe | swimsuit | wedding gown | sun hat | kimono | poncho | apron | blazer | parka
            | denim overall | winter mitten | leather glove | woollen sock | silk nightgown""",
        soft="""rug | blanket | cushion | curtain | pillow | towel | bath mat | tablecloth | bed sheet | beanbag | duvet
            | sleeping bag | yoga mat | carpet | table runner
            | heated footbag | picnic mattress | foam topper | linen napkin""",
        ware="""vase | teapot | flowerpot | fruit bowl | jug | candle holder | saucepan | frying pan | teacup | mug
            | salad bowl | pepper mill | cutting board | spice jar | sugar bowl | picture frame | bird cage
            | watering can | cookie jar | egg cup | corkscrew | soap dispenser | wok | serving tray
            | glass pitcher | copper pot | bamboo steamer | garden gnome | marble mortar | coffee grinder""",
    ),
    patterns={intent: patterns(text) for intent, text in TRAIN_PATTERNS.items()},
    cues={
        "high": items("""I need an answer by Friday. | I need this sorted out today.
            | It has to be settled before the weekend. | We go on holiday tomorrow, so it must happen today.
            | The birthday is on Saturday, so time is short. | I have to know by tonight.
            | My deadline is tomorrow morning. | I can only wait until Wednesday.
            | Guests are coming tomorrow, so please be quick. | This must be done by the end of the day.
            | Please deal with it before 5 pm today. | This is urgent. | It's really urgent! | URGENT!
            | Please hurry! | I need help right now. | Please reply as soon as you can. | Asap please!
            | Please treat this as top priority. | Please act on this at once. | I can't wait any longer.
            | This cannot wait. | Quick reply needed! | Please get back to me within the hour.
            | Please call me back immediately. | Very urgent, please.
            | Time is tight, I need it done this week. | It's a matter of hours now.
            | I must have this solved by Monday. | This is unacceptable! | I'm really angry about this.
            | This is the third time I've written! | I've been waiting for weeks and nobody answers!
            | I'm fed up with your excuses. | What a terrible service!
            | Nobody replies to my emails, I'm losing patience! | I'm so annoyed with you.
            | This is ridiculous. | If this isn't solved today I'll leave a bad review.
            | I've had it with your shop! | Worst shop ever. | Answer me or I'll call my lawyer!
            | I am very upset about this. | How many times do I have to ask?! | I'm running out of patience.
            | I have asked you twice already! | Your support is a joke! | There isn't a minute to lose.
            | I need a reply by tomorrow noon. | It must be resolved by Thursday. | Please answer urgently.
            | Hurry up, please. | I'm furious! | This is a scandal! | It's an urgent matter.
            | We have no time left. | I fly to Spain tomorrow and need this before I go.
            | The wedding is on Saturday, please be fast. | I expect an answer within 48 hours.
            | I want this solved now! | Please respond today. | Do something, now! | I'm sick of this.
            | My patience is gone. | I've complained twice and got no reply! | I'm done waiting!
            | Handle this first, please. | It's high time you did something!
            | Please be quick, it's needed this evening. | Your service is awful!
            | I have never been treated so badly! | This is an absolute shame! | It's an emergency for us.
            | We need this before the party tomorrow."""),
        "low": items("""No hurry. | There's no rush. | No rush at all. | Take your time.
            | Answer whenever you have a moment. | It's not urgent. | It can wait.
            | Just reply when you find the time. | I'm in no hurry. | Any time this month is fine.
            | No need to answer quickly. | This isn't pressing. | Whenever it suits you.
            | It doesn't matter if it takes a while. | I can wait a few weeks.
            | Next week or later is fine too. | Don't stress about it, it's low priority.
            | Don't drop anything for this. | Reply when things are quiet.
            | It's not important, so do it last. | Other customers can go first. | I don't mind waiting.
            | There's plenty of time. | Slow is fine. | It's nothing urgent. | Some time this year will do.
            | No deadline on my side. | Get to it when you get to it. | You can leave it until next month.
            | We have all the time in the world. | Not a big deal, no need to rush.
            | An answer can take a while, that's ok. | No hurry on my part.
            | I'm patient, so take all the time you need. | It's not time critical.
            | I won't need it any time soon. | I'm not in a hurry. | Waiting is fine with me.
            | Please take as long as you like. | Low priority. | It's fine to answer late.
            | I've got lots of time. | No pressure at all. | There is no time limit.
            | Feel free to answer next week. | I'm happy if it's done by summer.
            | Serve the others first, I have time. | Please don't hurry for me. | You don't need to rush.
            | This is not a priority. | Do it on a quiet day. | There's nothing urgent about this.
            | I'm easy about when. | Later is fine. | Tomorrow, next week, next month, all fine.
            | I have patience. | It is really not urgent at all. | Leave it for later if you're busy.
            | Some day next month is soon enough. | Please answer at your own pace."""),
    },
    tails={
        "high": items("""today | as soon as possible | right away | before Friday | immediately
            | by tomorrow at the latest | asap | right now | before the end of the week | at once
            | within the next hour | by tonight | with high priority | before Saturday | this morning
            | by noon today | quickly, it's urgent | this minute"""),
        "low": items("""whenever you get round to it | when you have a spare moment
            | some time this month, no hurry | whenever it suits you | when you find the time
            | at some point, no rush | in the next few weeks or so | whenever you can
            | once you have time for it | when it's quiet on your side | when you're not busy
            | at your own pace | some time next month | any time this season | when convenient"""),
    },
    before=items("""Order {n}: | #{n}: | About order {n}: | Regarding #{n}: | {n}: | This is about order {n}.
        | Order no. {n}. | My order number is {n}. | I have a question about {n}. | It's about my order {n}."""),
    after=items("""My order number is {n}. | The order is #{n}. | Order number {n}. | That's order {n}.
        | It's on order {n}. | ({n}) | Order ref {n}. | The number is {n}. | You'll find it under {n}.
        | Order: {n}. | #{n} | It was order #{n}. | Here's the order number: {n}."""),
    no_number=items("""I can't find my order number. | I don't have the order number here.
        | I've lost the order number. | No idea what the order number was. | I don't know my order number."""),
    details=items("""I bought it on your website. | It was a gift for my sister. | I paid by card.
        | My neighbour recommended your shop. | I've been a customer for years. | We moved house recently.
        | It's the second one I've bought from you. | I ordered it on my phone.
        | My husband picked the colour. | I live on the third floor. | Otherwise I like your shop.
        | I ordered through the app. | It's for my uncle. | I used the spring voucher.
        | Your website was easy to use. | I have an account with you. | My daughter chose it.
        | I saw it in your newsletter. | You can reach me by email. | Mail is better than phone for me.
        | I work from home. | My old one lasted ten years. | It's for my mother. | I paid with a gift card.
        | We have two cats, by the way. | I first saw it in your window. | My brother has the same one.
        | It was on sale last week. | You packed it very nicely last time. | I'm new to your shop.
        | My cousin told me about you. | I ordered as a guest. | The colour goes well with our kitchen.
        | It's meant for the office. | I compared several shops first. | My parents want one too.
        | I got the newsletter discount. | The film on your website is funny. | We run a small bakery.
        | I chose pick-up at the shop before. | I like the way it looks. | Your chat helped me in March.
        | I read good things about it. | I live in a small village. | The driver was friendly.
        | Our dog loves your boxes. | I'm writing for my grandmother. | I've told my neighbours about you.
        | You have a lovely shop window. | I'm a teacher, by the way. | I ordered two other things as well.
        | The app works fine for me. | My flatmate bought hers here. | I often order from abroad.
        | It's for the holiday home. | We are redoing the bathroom. | I found you on the internet.
        | I paid by instalments. | My wife likes your catalogue. | I'd rather not phone.
        | I kept the box and the papers. | It was the last one in stock. | We all liked the design.
        | I took part in your summer raffle. | My office is next to your branch. | I'm a member of your club.
        | I placed it with your Leeds branch. | Please write to my work address."""),
    greetings=items("Hi, | Hello, | Hi there, | Hi! | Hey, | Hello there. | Dear team, | Good evening, | Hello!"),
    closings=items("""Thanks! | Thank you. | Cheers, Ben | Many thanks. | Kind regards | Thanks in advance.
        | Best wishes, Anna | Thx | Bye, Tom | Thank you very much! | Regards, Paul | Warm regards
        | Greetings from Leeds
        | Sincerely, Ruth | Good luck with the shop! | Have a good weekend. | So long, Max | With kind wishes
        | I'd appreciate your help. | Nice to deal with you. | See you soon. | Bye for now! | Take care."""),
)

TEST = Phrases(
    products=products(
        gadget="smart lock | smartwatch | baby monitor",
        appliance="microwave | rice cooker | deep fryer",
        furniture="bench | cupboard | crib",
        wear="hoodie | blouse | skirt",
        soft="bedspread | doormat",
        ware="fish tank | carafe | cake stand",
    ),
    patterns={intent: patterns(text) for intent, text in TEST_PATTERNS.items()},
    cues={
        "high": items("""I must have your answer by noon. | It's an emergency! | There is no time to lose.
            | Please answer straight away, it's urgent. | This has to be resolved within 24 hours.
            | We need it settled by tomorrow evening. | My patience is at an end!
            | Your service is a disgrace! | I'm furious about this!
            | I complained last week and got no answer! | Please give this the highest priority.
            | The party is tomorrow, so hurry up please! | I'm running out of time.
            | I need it done before I fly on Thursday. | I want an answer now! | This is outrageous!
            | I'm sick and tired of waiting! | An urgent reply is needed."""),
        "low": items("""You needn't hurry. | I'm happy to wait. | It's low priority for me.
            | Feel free to leave this for a quiet day. | It's fine if this takes some time.
            | Some time next month is fine. | There's no time pressure at all.
            | Please help the others first, I can wait. | A late answer is fine with me.
            | Nothing urgent here. | No pressure, answer when you like. | I have plenty of patience.
            | I am not in a rush. | It really isn't urgent for me."""),
    },
    tails={
        "high": items("""without delay, it's urgent | straight away | by tomorrow evening | by noon tomorrow
            | urgently | before Thursday"""),
        "low": items("""when you are less busy | at your leisure | when it is convenient for you
            | in your own time, no rush | one of these weeks, no hurry"""),
    },
    before=items("Concerning {n}: | Re: order {n}. | I'm writing about #{n}. | With regard to order {n}:"),
    after=items("""Reference: {n}. | For your records: order {n}. | The confirmation says {n}.
        | You have it on file as #{n}. | The label shows number {n}. | Its order number: {n}."""),
    no_number=items("The order number escapes me. | I threw away the slip with the order number."),
    details=items("""My colleague has one too. | I found your store through a friend.
        | I signed up on your page in spring. | We like your range of goods.
        | The picture in the catalogue looked lovely. | Payment was by bank transfer. | I usually shop in person.
        | It's meant for my aunt. | My son wanted it. | You helped me well last year.
        | I share the flat with two friends. | I prefer to write rather than ring."""),
    greetings=items("Good morning, | Hey team, | Dear support, | Greetings! | Good day,"),
    closings=items("Thanks a lot. | Much appreciated. | Yours, Mila | All the best | Have a nice day."),
)
