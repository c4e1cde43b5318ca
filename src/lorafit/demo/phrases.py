"""The wordings of the demonstration data: one set for the training rows, another for the test rows, nothing in common.

Patterns stand one a line. `{p}` is the product, `{ap}` with its article, `{ps}` in the plural, `{P}` with a capital;
`[...]` is left out when the message has no order number or states it elsewhere; `{o}` is the order ("order KD4821",
"#KD4821", ...); `{t}` may take a tail that says how urgent it is. A head such as `wear:` or `device,furniture:` names
the kinds of product the pattern fits, and `none:` a pattern that names no product. No pattern by itself says how urgent
it is. Short phrases stand several a line between bars. All of it is invented for this package.
"""

from dataclasses import dataclass

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


TRAIN_PATTERNS = {
    "refund": """
I'd like my money back for the {p}[ from {o}]{t}.
Please refund the {p}[ I got with {o}]{t}.
Can I get a refund on the {p}[ ({o})]{t}?
I've sent the {p} back[ under {o}] and I'm waiting for the refund.
The {p}[ from {o}] isn't what I expected, I want my money back{t}.
How do I claim a refund for my {p}[ ({o})]?
You charged me twice for the {p}[ on {o}], please pay one back{t}.
I returned the {p} on Monday, when does the money[ for {o}] reach my account?
My {p} went back to you last week but the refund[ for {o}] hasn't shown up on my card.
The {p} doesn't suit me, so I'd like to be refunded[ for {o}]{t}.
I don't want to keep the {p}, could you give me the money back[ for {o}]{t}?
We changed our mind about the {p} and sent it back, please return the payment[ for {o}]{t}.
The {p} got cheaper the day after, can you refund the difference[ on {o}]{t}?
Please put the money for the {p}[ in {o}] back on my card{t}.
Refund for the {p}[, {o}]: it's back in your warehouse already.
What I paid for the {p}[ in {o}] should go back to my bank account{t}.
I would like to return the {p}[ from {o}] and be paid back{t}.
The {p} is not as described. I'd like a full refund[ for {o}]{t}.
Is it possible to get my money back for {ap}[ from {o}] I never used?
I was told I'd be refunded for the {p}[ on {o}], can you transfer the amount{t}?
Somehow I paid twice for one {p}[, {o}]. Please reimburse me{t}.
Could you reimburse me for the {p}[ on {o}]{t}?
The {p} isn't like the one in the advert, I'd rather have my money back[ ({o})].
Returned my {p} unopened[, {o}], now I'd like the refund{t}.
{P} sent back[ ({o})], please refund me{t}.
I sent both {ps} back[ from {o}] and would like the money returned{t}.
Please refund the two {ps}[ from {o}]{t}.
none: Everything in my parcel[ from {o}] went back to you, please refund me{t}.
none: I'd like a refund for my last purchase{t}[, {o}].
none: Please give me my money back for the whole thing{t}[, {o}].
none: Where is the refund[ for {o}] you told me about?""",
    "delivery": """
Where is my {p}[ from {o}]?
The {p}[ from {o}] hasn't arrived yet, could you check where it is{t}?
When will the {p}[ in {o}] be delivered?
Could you tell me when my {p}[ ({o})] will get here?
The tracking page for my {p}[, {o},] hasn't changed since Monday.
Has the {p}[ from {o}] been shipped yet?
I'm waiting for {ap}[ from {o}] and the courier never came.
The driver left a card but my {p}[ ({o})] isn't at the post office.
Tracking says the {p} was delivered[ for {o}] but there's nothing here.
Do you have a delivery date for the {p}[ in {o}]?
Please send me the tracking number for the {p}[ in {o}]{t}.
The {p} should have come on Tuesday[, {o}], do you know where it got stuck?
Which day does the van bring my {p}[ ({o})]?
My {p} seems to be lost in the post[, {o}].
Can you deliver the {p}[ from {o}] to my neighbour instead?
Please change the delivery address for the {p}[ in {o}] to my office{t}.
I haven't received the {p} I ordered[, {o}], can you look into it{t}?
Only half of my order came[, {o}], the {p} wasn't in the box.
Could you find out where the courier took my {p}[ ({o})]{t}?
Is the {p}[ from {o}] on its way?
Does the {p}[ in {o}] come by post or by courier?
My {p} has been sitting in your depot since Thursday[, {o}], please send it out{t}.
I was at home all day and nobody delivered the {p}[ from {o}].
What's the status of the shipment with my {p}[, {o}]?
{P} not here yet[, {o}], can you trace the parcel{t}?
How long does it take until the {p}[ from {o}] gets to me?
No sign of my {p}[, {o}], please check with the carrier{t}.
Only one of the two {ps}[ in {o}] has arrived, where's the other one?
I'm waiting for the three {ps}[ from {o}], are they on the way?
none: Where is my parcel[, {o}]?
none: My package[, {o},] hasn't arrived, could you track it{t}?
none: The courier says my parcel[ ({o})] was delivered but I don't have it.
none: When will the things I ordered[ with {o}] be delivered?""",
    "damaged": """
hard: The {p}[ from {o}] arrived broken.
My {p} came damaged[, {o}], what should I do?
hard: I unpacked the {p}[ from {o}] and one part is broken off.
The box was crushed and the {p}[ from {o}] in it is ruined.
hard: There's a big scratch on the {p}[ from {o}].
The {p}[ from {o}] fell apart after two days.
device: My {p}[, {o},] gave off smoke and is now dead.
device: The {p}[ from {o}] is defective, it died on the first day.
device,ware: There's a crack down the side of my {p}[, {o}].
cloth: The {p}[ from {o}] has a tear in the seam.
cloth: I found a hole in the {p}[ from {o}].
wear: My new {p} came with a torn sleeve[, {o}].
cloth: There are stains all over the {p}[ ({o})] you sent.
furniture: The wood of the {p}[ in {o}] is split.
furniture: One corner of the {p}[ in {o}] is smashed.
ware: The {p}[ from {o}] arrived in pieces.
ware: When I opened the box the {p}[ in {o}] was smashed.
ware: The {p} you sent me is chipped and cracked[, {o}].
hard: Your courier dropped my {p}[ ({o})], now it's broken.
device,furniture: The {p} I received[ with {o}] is bent and unusable.
I'm reporting damage to the {p}[ from {o}], I have pictures.
The {p} was already damaged when I took it out of the box[, {o}].
hard: {P} arrived with a dent and a crack[, {o}].
The {p} you delivered[ for {o}] was dirty and torn open.
My {p} is faulty[, {o}], it came apart in my hands.
device: My {p}[, {o},] makes a strange noise and has a broken switch.
Both {ps}[ from {o}] were damaged in the post.
hard: One of the two {ps}[ in {o}] is broken, the other one is fine.
none: Everything in the parcel[, {o},] was broken.
none: The package[ of {o}] looked fine but what's inside is damaged.
none: I opened my order[, {o},] and found it smashed to bits.
none: What you sent me[ with {o}] is broken, I've got photos.""",
    "cancel": """
Please cancel the {p}[ from {o}]{t}.
I'd like to cancel my order for the {p}{t}[, {o}].
Can I still cancel the {p}[ in {o}]?
I ordered the {p} by mistake[ ({o})], please cancel it{t}.
Please don't send the {p}[ from {o}], I don't need it any more.
I found the {p} cheaper elsewhere, so please cancel it{t}[, {o}].
Please stop the {p}[ in {o}] from being shipped, I've changed my mind.
We've decided against the {p}, can you cancel the order[ ({o})]{t}?
Could you take the {p} off my order{t}[, {o}]? We don't want it.
I clicked twice and bought one {p} too many[, {o}], please cancel one{t}.
How can I cancel the {p} I ordered[ ({o})]?
My wife already bought {ap}, so please cancel mine{t}[, {o}].
Please call off the order for the {p}{t}[, {o}].
I no longer want the {p}[ from {o}], please cancel it{t}.
Cancel my {p}[, {o}], please.
Is it too late to cancel the {p}[ on {o}]?
I'd like to withdraw my order of {ap}{t}[, {o}].
The wait for the {p} is too long for me, I'm cancelling[ {o}].
There's {ap} in my order[, {o},] that I don't want, please cancel it{t}.
No longer need the {p}[ from {o}], please cancel{t}.
Just ordered {ap}[ ({o})] and would like to cancel it{t}.
Can you confirm that the {p}[ in {o}] is cancelled?
I tried to cancel the {p}[ in {o}] online but the button doesn't work.
Cancellation: one {p}[, {o}], not needed after all.
I've bought {ap} in town, cancel the one I ordered from you{t}[, {o}].
The order for my {p}[, {o},] can be cancelled, I picked the wrong one.
Please cancel the two {ps}[ in {o}]{t}.
I ordered four {ps} by accident[ ({o})], please cancel them all{t}.
none: Please cancel my whole order{t}[, {o}].
none: I've changed my mind, please cancel everything[ in {o}]{t}.
none: Can I still cancel what I ordered yesterday[, {o}]?
none: I'd like to cancel my purchase{t}[, {o}], it was a mistake.""",
    "exchange": """
I'd like to exchange the {p}[ from {o}] for another colour{t}.
Can I swap my {p}[ ({o})] for another model?
wear: The {p}[ from {o}] is too small, can I swap it for the next size up?
wear: Please exchange my {p}[, {o},] for a size L{t}.
wear: The {p} is too tight, I need a bigger one instead[ ({o})].
wear: I ordered the {p} in the wrong size[, {o}], can you swap it{t}?
You sent me the wrong {p}[ with {o}], please swap it for the right one{t}.
I got a green {p} but ordered a black one[, {o}], can you exchange it{t}?
Could I trade the {p}[ from {o}] for the larger version{t}?
The colour of the {p} doesn't match, I'd like to swap it for a white one[ ({o})]{t}.
Is it possible to change the {p}[ from {o}] for the same one in grey?
I'd rather have the bigger {p}, can we swap[ ({o})]?
How do exchanges work? I want a different {p} from the one I got[ in {o}].
Please replace my {p}[, {o},] with the newer version{t}.
I picked the wrong {p}[ in {o}] and would like to swap it for another kind{t}.
I'd like the {p} in blue rather than red, can I exchange it[ ({o})]{t}?
furniture: The {p}[ from {o}] is too big for our room, may I change it for the small one?
Please send me the other {p} in exchange for this one{t}[, {o}].
Wrong colour {p} in the box[, {o}], can it be swapped{t}?
Do you exchange items? I'd like my {p}[ from {o}] in a darker shade.
cloth,ware: I would love the striped {p} instead of the plain one, can I swap[ ({o})]?
Can you take the {p} back and send me a smaller one instead{t}[, {o}]?
device: We'd like to switch the {p}[ from {o}] for the model with more features{t}.
wear: Medium was a mistake, please exchange the {p}[ from {o}] for a small one{t}.
The {p} isn't the one I chose[ in {o}], please exchange it{t}.
Swap the {p}[ from {o}] for the cheaper one and I'm happy.
furniture: The {p} came in oak but I ordered pine[, {o}], please exchange it{t}.
Please swap both {ps}[ from {o}] for the large ones{t}.
none: You sent me the wrong item[ for {o}], can I exchange it{t}?
none: I'd like to swap the things[ from {o}] for a different colour{t}.
none: How do I exchange something[ from {o}] for another size?
none: I got somebody else's order[ instead of {o}], please swap it{t}.""",
    "invoice": """
Please send me the invoice for the {p}{t}[, {o}].
I need a receipt for the {p}[ from {o}] for my taxes.
The invoice for my {p}[, {o},] is missing from the box.
Could you email me a copy of the bill for the {p}[ ({o})]{t}?
There's a mistake on the invoice for the {p}[, {o}], the address is wrong.
Can I get an invoice with my company name for the {p}[ in {o}]{t}?
The bill for the {p}[ in {o}] shows the wrong VAT.
I can't download the invoice for my {p}[, {o}].
Where do I find the receipt for the {p}[ from {o}]?
My employer wants an invoice for the {p}[, {o}], can you send one{t}?
Please put our VAT number on the invoice for the {p}[ ({o})]{t}.
I never got a receipt for the {p}[ from {o}].
Please resend the invoice for the {p}[ in {o}]{t}, I deleted the mail.
May I have a paper invoice for the {p}[ ({o})]{t}?
The price on the invoice for the {p}[, {o},] isn't what I paid.
Could you correct the name on the bill for my {p}{t}[, {o}]?
For the guarantee I need the receipt of the {p}[ from {o}].
I bought {ap} for work[ ({o})] and need a proper invoice{t}.
Our accountant is asking for the {p} invoice[ ({o})].
Please issue the bill for the {p}[ in {o}] to my firm, not to me.
The PDF invoice for the {p}[, {o},] won't open.
Invoice for the {p}[, {o}], please.
A receipt for the {p}[ in {o}] would be nice, I can't find mine.
Can you split the bill for the {p}[ in {o}] into two invoices{t}?
Do you send invoices by post? I need one for my {p}[ ({o})].
Which date is on the invoice for my {p}[, {o}]? Mine is unreadable.
I need one invoice for all five {ps}[ in {o}]{t}.
The bill lists three {ps} but I bought two[, {o}], please correct it{t}.
none: Please send me the invoice[ for {o}]{t}.
none: I need a copy of my receipt[ for {o}]{t}, the old one is lost.
none: The invoice[ for {o}] has the wrong address on it.
none: Could I get a bill[ for {o}] made out to my company{t}?""",
    "setup_help": """
gadget: How do I connect the {p}[ from {o}] to my phone?
gadget: I can't pair the {p}[, {o},] with my laptop, how does it work?
gadget: The app doesn't find my {p}[ ({o})], how do I add it?
gadget: Which cable do I need to hook up the {p}[ from {o}]?
device: Could you walk me through the first setup of the {p}[ ({o})]{t}?
device: I don't understand the manual of the {p}[ from {o}], how do I switch it on?
device: What does the blinking light on my {p}[, {o},] mean?
gadget: How do I reset the {p}[ from {o}] to its factory settings?
device: The {p}[ from {o}] came without instructions, how do I start it?
device,furniture: Can you send me the manual for the {p}[ ({o})]{t}?
appliance: Do I need to clean the {p}[ from {o}] before I use it?
appliance: Which button starts the {p}[ from {o}]? I can't work it out.
device,furniture: Is there a video that shows how to set up the {p}[ from {o}]?
furniture: How do I put the {p}[ from {o}] together?
furniture: I'm stuck at step four of assembling the {p}[, {o}].
furniture: Which screws go where on the {p}[ from {o}]?
furniture: The instructions for the {p}[ ({o})] are only pictures, can you explain them{t}?
furniture: Do I need a drill to assemble the {p}[ from {o}]?
furniture: Could someone help me build the {p}[ from {o}]{t}?
furniture: Which way round does the back of the {p} go[, {o}]?
device,furniture: I need help setting up my {p}{t}[, {o}].
device,furniture: Can you help me get the {p}[ from {o}] set up{t}?
device,furniture: Where can I find the instructions for the {p}[ in {o}]?
device,furniture: I've lost the manual of my {p}[ ({o})], can you mail it{t}?
gadget: The {p} asks for a code when I start it[, {o}], where do I find that?
gadget: My {p}[, {o},] wants a software update, how do I install it?
gadget: How do I change the language on the {p}[ from {o}]?
gadget: Trying to install the {p}[ ({o})] but the menu makes no sense to me.
gadget: How do I link the two {ps}[ from {o}] with each other?
appliance: Please tell me how to use the {p}[ from {o}]{t}.""",
}

TEST_PATTERNS = {
    "refund": """
Could the cost of the {p}[ in {o}] be refunded to me{t}?
I shipped the {p} back to you and now expect the purchase price back[ for {o}].
Kindly issue a refund for my {p}[ under {o}]{t}.
The {p} was not to our liking, so I want the money I paid returned to me[, see {o}].
Has my refund for the {p}[ on {o}] been processed?
I'm returning this {p}, so please send the money[ for {o}] to my account{t}.
The {p} is of no use to me, I'm asking for a refund[ on {o}]{t}.
One {p}, billed two times[ under {o}]: I want the extra charge refunded{t}.
Your courier collected the {p} I returned, what about my refund[ for {o}]?
I'd prefer a refund over a voucher for the {p}[ from {o}].
none: Kindly refund the entire purchase{t}[, {o}].""",
    "delivery": """
I wonder what happened to the {p}[ from {o}], it never reached me.
Any news on the arrival of my {p}[ ({o})]?
My {p}[ from {o}] is late, what is the new arrival date?
Has my {p}[, {o},] left the warehouse?
The postman brought nothing, although my {p}[ from {o}] was announced for yesterday.
Is there a link to track the shipment of my {p}[ from {o}]?
Where has the carrier put the {p}[ from {o}]? It is nowhere in sight.
Please have the {p}[ from {o}] dropped off at my workplace{t}.
Could you look up when the {p}[ in {o}] should reach me{t}?
No {p} in the mail so far[ for {o}], would you ask the delivery firm{t}?
I paid for two {ps}[ under {o}] and just one was in the parcel, is the rest coming?
none: My shipment[, {o},] has gone missing, could you locate it{t}?""",
    "damaged": """
Sadly the {p}[ from {o}] was damaged when I opened the package.
hard: The {p} reached me in a bad state[, {o}], it has dents and scratches.
Something must have hit the {p}[ from {o}] in transit, it's wrecked.
hard: A piece of the {p}[ from {o}] has snapped off.
cloth: The fabric of the {p}[ from {o}] is ripped.
ware: The {p}[ in {o}] had shattered before I unwrapped it.
device: Your {p}[, {o},] is faulty, it broke after one hour.
furniture: The top of the {p}[ from {o}] is badly cracked.
My {p} is defective[, {o}], photos are attached.
The parcel got wet and the {p}[ from {o}] is spoiled.
cloth: There's an ugly stain and a hole on the {p}[ from {o}].
none: What I took out of the parcel[, {o},] was broken beyond repair.""",
    "cancel": """
Would you cancel the {p} that I booked[ under {o}]{t}?
I have no use for the {p} any longer, kindly cancel it{t}[, {o}].
I have second thoughts about the {p}[ in {o}], please drop it from the order{t}.
Ordering the {p}[ ({o})] was an error on my part, could you cancel it{t}?
I wish to cancel {ap}[ bought under {o}]{t}.
A friend gave me {ap}, so I'm cancelling the one from your shop[, {o}].
Kindly halt the {p} order[, {o}], I won't be needing it.
Could the purchase of the {p}[, {o},] be cancelled{t}?
Am I able to cancel {ap} that hasn't left your stock[, {o}]?
Our plans are different now, so the {p}[ from {o}] should be cancelled{t}.
none: I don't need any of it now, so cancel the lot{t}[, {o}].""",
    "exchange": """
Would you switch my {p}[ from {o}] for one in another colour{t}?
I'd be glad to trade in this {p}[, {o},] for the next bigger one.
wear: The {p}[ from {o}] is a size too large, kindly exchange it{t}.
wear: Could I get the {p}[ of {o}] one size smaller in exchange for mine{t}?
Somebody packed the wrong {p}[ for {o}], let me swap it for mine.
I asked for a yellow {p} and got a brown one[, {o}], kindly exchange it{t}.
May I hand in this {p} and get the deluxe version in return{t}[, {o}]?
Exchanging the {p}[ from {o}] for a different type would be great.
furniture: Our {p}[, {o},] is too wide for the corner, could it be swapped for the narrow one{t}?
Please let me swap the {p}[ in {o}] for the other design{t}.
none: The wrong goods came[ for {o}], I want them exchanged{t}.""",
    "invoice": """
Would you mail me an invoice that covers the {p}[ in {o}]{t}?
My tax office wants proof that I bought the {p}[, {o}], could I get the bill{t}?
No invoice came along with the {p}[ from {o}].
The {p} receipt[ for {o}] got lost, can you print another{t}?
Kindly add our company address to the {p} invoice{t}[, {o}].
I'm after a duplicate of the bill for my {p}[ from {o}].
Your invoice[ for {o}] lists the {p} at the wrong price.
Please make the receipt for my {p}[ ({o})] out to my business{t}.
How can I see the invoice of the {p}[ from {o}] in my account?
To claim my {p} as an expense I need the invoice document[ for {o}]{t}.
none: A fresh copy of the invoice[ for {o}] would help me.""",
    "setup_help": """
gadget: My phone won't link up with the {p}[ from {o}], which steps am I missing?
gadget: What must I press to get the {p}[, {o},] online?
device: Could you guide me through installing the {p}[ from {o}]{t}?
device: I have no idea how to operate my {p}[ ({o})], can you explain it{t}?
device: Is there a quick start guide for the {p}[ from {o}]?
furniture: I can't figure out how the parts of the {p}[ from {o}] fit together.
furniture: Putting up the {p}[ ({o})] is hard, do you have better instructions?
furniture: In what order are the boards of the {p} mounted[, {o}]?
device,furniture: Please explain the setup of this {p}[ from {o}] to me{t}.
appliance: How does one use this {p}[ from {o}] properly?
device: Help with the installation of my {p}[, {o},] would be welcome.""",
}

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
