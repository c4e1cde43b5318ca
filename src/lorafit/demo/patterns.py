"""Sentences that make an intent clear, one a line, for training and test rows; `phrases.py` says how to read them."""

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
