"""Generates every text that the demo model sees. No external text is used.

A document is a list of segments `(text, weight)`. The weight scales the loss of the segment's
tokens: answers count fully, filler hardly, and things nobody can predict (a fresh random code,
the numbers of a new problem) not at all. Special tokens are segments of their own (BOS, ...).

Run as a script it writes the held-out sets:  python3 data.py --eval-dir ../demo/eval
The held-out problems come from their own seed, and the training generator refuses to emit any
question that is in that set.
"""
import argparse
import json
import os
import random
import re

BOS, EOS, IM_START, IM_END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIAL = (BOS, EOS, IM_START, IM_END)
HELD_OUT_SEED = 20000003
TEXT, LOW, NONE, FULL = 0.05, 0.2, 0.0, 1.0
FIRST = 4.0  # the first digit of a recalled code: it alone needs the right record to be found

NAMES = ("Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul "
         "Rosa Sam Tina Victor Wendy Yusuf Zoe Omar").split()
THINGS = ("apples marbles stickers books pencils coins cards shells buttons cookies oranges beads "
          "stamps balloons flowers candies stones pears toys ribbons").split()
# Words only for training, so that the model also copies what the tokenizer has no piece for.
MORE_NAMES = ("Tom Alice Bob Lucy Ali Mia Max John Mary Sara Peter Lily Eva Tim Amy Nina Oscar "
              "Rita Dan Jane Mark Julia Mike Emily James Lisa Ryan Clara Hugo Betty Janet Natalia "
              "Chen Priya Fatima Ivan Yuki Pedro Sofia Liam").split()
MORE_THINGS = ("bananas eggs pens dolls rocks cars birds hats lemons plums nuts keys bricks "
               "bottles photos crayons tulips cups kites spoons").split()
BOXES = "boxes bags baskets jars crates shelves packs trays".split()
GOODS = "pen ball cup kite lamp hat mug scarf ticket cake notebook puzzle".split()

ADJECTIVES = ("red blue green yellow white black silver golden small large old new round wooden "
              "iron glass quiet bright dark heavy light broken painted striped hidden empty "
              "ancient narrow soft wild frozen dusty purple orange copper plain tall rusty "
              "smooth crooked").split()
NOUNS = ("lantern door box key chair table clock bottle bridge tower garden wagon mirror basket "
         "drum boat bell candle hammer ladder window carpet statue engine barrel coat fence gate "
         "kettle pillow anchor cabin flute ring saddle shield vase wheel umbrella desk").split()
PEOPLE = ("baker farmer teacher sailor doctor painter singer gardener miller hunter driver "
          "neighbor traveler child").split()
VERBS = ("walked slept waited worked rested sang danced looked stood smiled talked played").split()
PLACES = ("river market forest harbor hill station village lake school mill field beach valley "
          "road church").split()
TIMES = ("in the morning,in the evening,at noon,at night,after lunch,before dawn,all day,"
         "for an hour,in the rain,in the snow,every week,last summer").split(",")
WEATHER = "cold warm windy rainy cloudy calm foggy sunny".split()


# ---------------------------------------------------------------- word problems

def plural(n, word):
    return f"{n} {word}" if n != 1 else f"{n} {word[:-1]}"


def two(r, pool):
    return r.sample(pool, 2)


def p_chain(r):
    """A start, one to three changes."""
    n, m = two(r, NAMES)
    thing = r.choice(THINGS)
    have = r.randint(3, 60)
    text, steps = [f"{n} has {plural(have, thing)}."], [f"{n} starts with {plural(have, thing)}."]
    for i in range(r.choice((1, 2, 2, 3))):
        kind = r.random()
        then = "Then " if i else ""
        if kind < 0.45 or have < 6:
            b = r.randint(2, 40)
            what = r.choice((f"{n} buys {b} more.", f"{n} finds {b} more.", f"{n} wins {b} more.",
                             f"{m} gives {n} {b} more."))
            steps.append(f"{n} gets {b} more, so {have} + {b} = {have + b}.")
            have += b
        elif kind < 0.9 or have > 50:
            b = r.randint(2, min(have - 1, 40))
            what = r.choice((f"{n} gives {b} to {m}.", f"{n} loses {b}.", f"{n} sells {b}.",
                             f"{n} uses {b}."))
            steps.append(f"{n} has {b} fewer, so {have} - {b} = {have - b}.")
            have -= b
        else:
            k = r.choice((2, 2, 3))
            what = f"{n} {'doubles' if k == 2 else 'triples'} that number."
            steps.append(f"The number is multiplied by {k}, so {have} * {k} = {have * k}.")
            have *= k
        text.append(then + what)
    text.append(r.choice((f"How many {thing} does {n} have now?",
                          f"How many {thing} does {n} have in the end?")))
    return " ".join(text), steps, have


def p_price(r):
    n, good = r.choice(NAMES), r.choice(GOODS)
    p, k = r.randint(2, 12), r.randint(2, 9)
    ask = r.choice((f"How much does {n} pay?", f"How many dollars does {n} spend?"))
    return (f"One {good} costs {p} dollars. {n} buys {k} of them. {ask}",
            [f"{n} pays {k} * {p} = {k * p} dollars."], k * p)


def p_change(r):
    n, good = r.choice(NAMES), r.choice(GOODS)
    p, k = r.randint(2, 9), r.randint(2, 9)
    bill = r.choice([b for b in (20, 50, 100) if b > p * k])
    return (f"A {good} costs {p} dollars. {n} buys {k} of them and pays with {bill} dollars. "
            f"How many dollars does {n} get back?",
            [f"The price is {k} * {p} = {k * p} dollars.",
             f"{n} gets back {bill} - {k * p} = {bill - k * p} dollars."], bill - k * p)


def p_two_goods(r):
    n = r.choice(NAMES)
    g, h = two(r, GOODS)
    p, q, j, k = (r.randint(2, 9) for _ in range(4))
    return (f"A {g} costs {p} dollars and a {h} costs {q} dollars. {n} buys {j} of the first and "
            f"{k} of the second. How many dollars does {n} pay?",
            [f"The first costs {j} * {p} = {j * p} dollars.",
             f"The second costs {k} * {q} = {k * q} dollars.",
             f"Together that is {j * p} + {k * q} = {j * p + k * q} dollars."], j * p + k * q)


def p_boxes(r):
    n, thing, box = r.choice(NAMES), r.choice(THINGS), r.choice(BOXES)
    k, m, e = r.randint(2, 9), r.randint(2, 12), r.randint(2, 30)
    kind = r.randrange(3)
    text = f"{n} has {k} {box} with {m} {thing} each."
    steps = [f"The {box} hold {k} * {m} = {k * m} {thing}."]
    if kind == 0:
        return f"{text} How many {thing} does {n} have?", steps, k * m
    if kind == 1:
        return (f"{text} There are {e} more {thing} on the table. How many {thing} are there?",
                steps + [f"With the others there are {k * m} + {e} = {k * m + e}."], k * m + e)
    e = r.randint(1, k * m - 1) if k * m < 30 else e
    return (f"{text} {n} gives away {plural(e, thing)}. How many {thing} are left?",
            steps + [f"After that {k * m} - {e} = {k * m - e} are left."], k * m - e)


def p_share(r):
    n, thing = r.choice(NAMES), r.choice(THINGS)
    d, q = r.randint(2, 9), r.randint(2, 12)
    total = d * q
    ask = f"How many {thing} does each friend get?"
    if r.random() < 0.5 or total < 8:
        return (f"{n} shares {total} {thing} equally among {d} friends. {ask}",
                [f"Each friend gets {total} / {d} = {q} {thing}."], q)
    b = r.randint(2, min(total - 2, 40))
    return (f"{n} has {plural(total - b, thing)} and gets {b} more. Then {n} shares all of them "
            f"equally among {d} friends. {ask}",
            [f"{n} has {total - b} + {b} = {total} {thing}.",
             f"Each friend gets {total} / {d} = {q} {thing}."], q)


def p_compare(r):
    (n, m), thing = two(r, NAMES), r.choice(THINGS)
    a = r.randint(5, 50)
    more = r.random() < 0.5
    b = r.randint(2, 30 if more else a - 2)
    c = a + b if more else a - b
    sign = "+" if more else "-"
    text = (f"{n} has {a} {thing}. {m} has {b} {'more' if more else 'fewer'} {thing} than {n}.")
    steps = [f"{m} has {a} {sign} {b} = {c} {thing}."]
    if r.random() < 0.4:
        return f"{text} How many {thing} does {m} have?", steps, c
    return (f"{text} How many {thing} do they have together?",
            steps + [f"Together they have {a} + {c} = {a + c} {thing}."], a + c)


def p_times(r):
    (n, m), thing = two(r, NAMES), r.choice(THINGS)
    a, k = r.randint(2, 12), r.randint(2, 6)
    text = f"{n} has {a} {thing}. {m} has {k} times as many {thing} as {n}."
    steps = [f"{m} has {k} * {a} = {k * a} {thing}."]
    if r.random() < 0.5:
        return (f"{text} How many {thing} do they have together?",
                steps + [f"Together they have {a} + {k * a} = {a + k * a} {thing}."], a + k * a)
    return (f"{text} How many more {thing} does {m} have than {n}?",
            steps + [f"The difference is {k * a} - {a} = {k * a - a} {thing}."], k * a - a)


def p_pages(r):
    n = r.choice(NAMES)
    p, d = r.randint(3, 12), r.randint(2, 9)
    total = p * d + r.randint(5, 60)
    return (f"A book has {total} pages. {n} reads {p} pages each day for {d} days. How many pages "
            "are left?",
            [f"{n} reads {d} * {p} = {d * p} pages.",
             f"There are {total} - {d * p} = {total - d * p} pages left."], total - d * p)


def p_savings(r):
    n = r.choice(NAMES)
    s, w, h = r.randint(2, 12), r.randint(2, 9), r.randint(3, 50)
    return (f"{n} has {h} dollars and saves {s} dollars each week. How many dollars does {n} have "
            f"after {w} weeks?",
            [f"{n} saves {w} * {s} = {w * s} dollars.",
             f"Then {n} has {h} + {w * s} = {h + w * s} dollars."], h + w * s)


def p_bus(r):
    a, off, on = r.randint(10, 50), r.randint(2, 9), r.randint(2, 20)
    what = r.choice(("bus", "train", "boat"))
    text = (f"There are {a} people on a {what}. At the first stop {off} people get off and {on} "
            "people get on.")
    b, c = a - off, a - off + on
    steps = [f"After {off} get off there are {a} - {off} = {b} people.",
             f"After {on} get on there are {b} + {on} = {c} people."]
    if r.random() < 0.5:
        return f"{text} How many people are on the {what} now?", steps, c
    off = r.randint(2, min(c - 1, 20))
    return (f"{text} At the second stop {off} people get off. How many people are on the {what} "
            "now?", steps + [f"After {off} get off there are {c} - {off} = {c - off} people."],
            c - off)


def p_age(r):
    n, m = two(r, NAMES)
    a, b, c = r.randint(5, 40), r.randint(2, 20), r.randint(2, 15)
    return (f"{n} is {a} years old. {m} is {b} years older than {n}. How old will {m} be in {c} "
            "years?",
            [f"{m} is {a} + {b} = {a + b} years old.",
             f"In {c} years {m} will be {a + b} + {c} = {a + b + c}."], a + b + c)


def p_legs(r):
    a, b = r.randint(2, 15), r.randint(2, 15)
    four, pair = r.choice(("cows", "horses", "goats")), r.choice(("chickens", "ducks", "geese"))
    return (f"A farm has {a} {four} and {b} {pair}. Each of the {four} has 4 legs and each of the "
            f"{pair} has 2 legs. How many legs are there?",
            [f"The {four} have {a} * 4 = {a * 4} legs.", f"The {pair} have {b} * 2 = {b * 2} legs.",
             f"Together there are {a * 4} + {b * 2} = {a * 4 + b * 2} legs."], a * 4 + b * 2)


def p_rows(r):
    k, m = r.randint(2, 9), r.randint(3, 12)
    e = r.randint(1, k * m - 1)
    where, what = r.choice((("hall", "chairs"), ("field", "trees"), ("garden", "plants")))
    verb = {"chairs": "are broken", "trees": "are cut down", "plants": "die"}[what]
    return (f"A {where} has {k} rows with {m} {what} in each row. Then {e} of the {what} {verb}. "
            f"How many good {what} are left?",
            [f"There are {k} * {m} = {k * m} {what}.",
             f"Then {k * m} - {e} = {k * m - e} {what} are left."], k * m - e)


def p_walk(r):
    n = r.choice(NAMES)
    a, b, d = r.randint(1, 6), r.randint(1, 6), r.randint(2, 9)
    return (f"{n} walks {a} miles each morning and {b} miles each evening. How many miles does "
            f"{n} walk in {d} days?",
            [f"In one day {n} walks {a} + {b} = {a + b} miles.",
             f"In {d} days {n} walks {d} * {a + b} = {d * (a + b)} miles."], d * (a + b))


def p_work(r):
    n = r.choice(NAMES)
    p, h, s = r.randint(3, 12), r.randint(2, 9), r.randint(2, 20)
    s = min(s, p * h - 1)
    return (f"{n} earns {p} dollars an hour and works {h} hours. Then {n} spends {s} dollars. How "
            f"many dollars are left?",
            [f"{n} earns {h} * {p} = {h * p} dollars.",
             f"After that {h * p} - {s} = {h * p - s} dollars are left."], h * p - s)


def p_half(r):
    thing, n = r.choice(THINGS), r.choice(NAMES)
    a = 2 * r.randint(3, 30)
    b = r.randint(1, a // 2 - 1)
    return (f"{n} has {a} {thing}. Half of them are red. {n} gives away {b} of the red {thing}. "
            f"How many red {thing} does {n} have left?",
            [f"There are {a} / 2 = {a // 2} red {thing}.",
             f"Then {a // 2} - {b} = {a // 2 - b} red {thing} are left."], a // 2 - b)


def p_recipe(r):
    n = r.choice(NAMES)
    c, k = r.randint(2, 9), r.randint(2, 9)
    h = r.randint(1, c * k - 1)
    what = r.choice(("cups of flour", "spoons of sugar", "eggs"))
    return (f"One cake needs {c} {what}. {n} wants to bake {k} cakes and already has {h} {what}. "
            f"How many more {what} does {n} need?",
            [f"{n} needs {k} * {c} = {k * c} {what}.",
             f"So {n} needs {k * c} - {h} = {k * c - h} more."], k * c - h)


def p_class(r):
    a, b = r.randint(5, 30), r.randint(5, 30)
    c = r.randint(1, 9)
    return (f"A class has {a} girls and {b} boys. Today {c} of the children are sick. How many "
            "children are at school today?",
            [f"The class has {a} + {b} = {a + b} children.",
             f"Today {a + b} - {c} = {a + b - c} are at school."], a + b - c)


def p_score(r):
    n = r.choice(NAMES)
    a, b, c = (r.randint(3, 40) for _ in range(3))
    return (f"{n} scores {a} points in the first game, {b} points in the second game and {c} "
            "points in the third game. How many points is that in total?",
            [f"After two games {n} has {a} + {b} = {a + b} points.",
             f"After three games {n} has {a + b} + {c} = {a + b + c} points."], a + b + c)


def p_goal(r):
    n, good = r.choice(NAMES), r.choice(GOODS)
    h, e = r.randint(3, 40), r.randint(3, 30)
    t = h + e + r.randint(2, 30)
    return (f"{n} wants to buy a {good} for {t} dollars. {n} has {h} dollars and earns {e} more. "
            f"How many dollars does {n} still need?",
            [f"{n} has {h} + {e} = {h + e} dollars.",
             f"{n} still needs {t} - {h + e} = {t - h - e} dollars."], t - h - e)


PROBLEMS = [p_chain, p_chain, p_chain, p_price, p_change, p_two_goods, p_boxes, p_boxes, p_share,
            p_compare, p_compare, p_times, p_pages, p_savings, p_bus, p_age, p_legs, p_rows,
            p_walk, p_work, p_half, p_recipe, p_class, p_score, p_goal]


def renamed(r, *texts):
    """The texts with the names, and half of the time the things, replaced by other ones."""
    new = dict(zip(NAMES, r.sample(MORE_NAMES, len(NAMES))))
    if r.random() < 0.5:
        for old, word in zip(THINGS, r.sample(MORE_THINGS, len(THINGS))):
            new |= {old: word, old[:-1]: word[:-1]}
    return [re.sub(r"[A-Za-z]+", lambda m: new.get(m[0], m[0]), t) for t in texts]


def problem(r, forbidden=None):
    """(question, answer) with the answer in GSM8K form.

    The training stream passes the `forbidden` questions; it never gets one of them, and in a third
    of its problems other words are put in.
    """
    while True:
        question, steps, result = r.choice(PROBLEMS)(r)
        answer = "\n".join(steps) + f"\n#### {result}"
        if forbidden is None:
            return question, answer
        if r.random() < 0.33:
            question, answer = renamed(r, question, answer)
        if question not in forbidden:
            return question, answer


def held_out_problems(count=200, seed=HELD_OUT_SEED):
    r, seen = random.Random(f"problems-{seed}"), {}
    while len(seen) < count:
        question, answer = problem(r)
        seen.setdefault(question, answer)
    return [{"question": q, "answer": a} for q, a in seen.items()]


def shots(count, seed=HELD_OUT_SEED + 1):
    """Worked examples for few-shot prompts: neither training stream nor held-out set."""
    r = random.Random(f"shots-{seed}")
    return [problem(r) for _ in range(count)]


def few_shot_prompt(question, examples=()):
    text = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples)
    return f"{text}Question: {question}\nAnswer:"


# ---------------------------------------------------------------- arithmetic drill

def sum_line(r):
    kind = r.randrange(8)
    if kind < 3:
        a, b = r.randint(1, 99), r.randint(1, 60)
        return f"{a} + {b} =", a + b
    if kind < 6:
        a = r.randint(3, 140)
        b = r.randint(1, min(a - 1, 80))
        return f"{a} - {b} =", a - b
    a, b = r.randint(2, 12), r.randint(2, 12)
    if kind == 6:
        return f"{a} * {b} =", a * b
    return f"{a * b} / {a} =", b


def drill(r):
    if r.random() < 0.7:
        doc = [(BOS, NONE)]
        for _ in range(r.randint(4, 12)):
            left, right = sum_line(r)
            doc += [(left, NONE), (f" {right}\n", FULL)]
        return doc + [(EOS, NONE)]
    turns = []
    for _ in range(r.randint(1, 3)):
        left, right = sum_line(r)
        ask = r.choice(("What is {}?", "How much is {}?", "Calculate {}.", "{} = ?"))
        turns.append((ask.format(left[:-2]), f"{left} {right}"))
    return chat(r, turns)


# ---------------------------------------------------------------- recall

def filler_sentence(r):
    a, n, p, l = r.choice(ADJECTIVES), r.choice(NOUNS), r.choice(PEOPLE), r.choice(PLACES)
    kind = r.randrange(7)
    if kind == 0:
        return f"The {p} {r.choice(VERBS)} near the {l} {r.choice(TIMES)}."
    if kind == 1:
        return f"It was a {r.choice(WEATHER)} day and the {p} {r.choice(VERBS)} by the {l}."
    if kind == 2:
        return f"{r.choice(NAMES)} saw the {p} at the {l} {r.choice(TIMES)}."
    if kind == 3:
        return f"The {a} {n} stood near the {l} {r.choice(TIMES)}."
    if kind == 4:
        return f"Nobody at the {l} knew where the {a} {n} was."
    if kind == 5:
        return f"{r.choice(NAMES)} and the {p} {r.choice(VERBS)} at the {l} {r.choice(TIMES)}."
    return f"The {p} painted a {n} and {r.choice(VERBS)} {r.choice(TIMES)}."


def fresh_key(r, used, parts=None):
    """A new "adjective noun"; with a set `parts`, one that shares no word with earlier ones."""
    while True:
        adjective, noun = r.choice(ADJECTIVES), r.choice(NOUNS)
        key = f"{adjective} {noun}"
        if parts is not None and len(parts) < 50:
            if adjective in parts or noun in parts:
                continue
            parts |= {adjective, noun}
        if key not in used:
            used.add(key)
            return key


def code_segments(code):
    return [(" ", FULL), (code[0], FIRST), (code[1:], FULL)]


# Rough token counts; every word is one token, a number costs one more than its digits.
RELIST_SHARE = 0.4
RECORD_TOKENS, FILLER_TOKENS, QUERY_TOKENS = 14, 11, 32


def recall_context(r, tokens, used, density, records=1):
    """About `tokens` tokens of sentences; returns them and the list of (key, code).

    `density` is the share of sentences that are records (at least `records` of them).
    """
    count = max(records, int(tokens / (density * RECORD_TOKENS + (1 - density) * FILLER_TOKENS)))
    is_record = [r.random() < density for _ in range(count)]
    for i in r.sample(range(count), records):
        is_record[i] = True
    sentences, facts = [], []
    for flag in is_record:
        if flag:
            key, code = fresh_key(r, used), f"{r.randrange(10000):04d}"
            facts.append((key, code))
            sentences.append((key, code))
        else:
            sentences.append(filler_sentence(r))
    return sentences, facts


def context_segments(r, sentences):
    """Segments of a context, with a line break now and then."""
    out = []
    for i, s in enumerate(sentences):
        lead = "" if i == 0 else ("\n" if r.random() < 0.1 else " ")
        if isinstance(s, tuple):
            out += [(f"{lead}The code of the", TEXT), (f" {s[0]}", NONE), (" is", LOW),
                    (f" {s[1]}", NONE), (".", TEXT)]
        else:
            out.append((lead + s, TEXT))
    return out


def recall_answer(key, code):
    return [(f" The code of the {key} is", LOW)] + code_segments(code) + [(".", FULL)]


def relist(r, room, used):
    """Records, then the same records in another order: the densest lesson in looking things up.

    As sentences or as lines `red lantern 4821`; half of the time no two keys share a word.
    """
    table = r.random() < 0.4
    size = min(room - 12, int(64 * (room / 64) ** r.random()))
    parts = set() if r.random() < 0.5 else None
    count = max(2, size // (16 if table else 28))
    facts = [(fresh_key(r, used, parts), f"{r.randrange(10000):04d}") for _ in range(count)]
    doc = [(BOS, NONE)]
    for again in (False, True):
        for i, (key, code) in enumerate(facts):
            if table:
                doc.append((f"{key}", NONE))
            else:
                doc.append((f"{' ' if i else ''}The code of the {key} is", NONE))
            doc += code_segments(code) if again else [(f" {code}", NONE)]
            doc.append(("\n" if table else ".", LOW))
        if not again:
            doc.append(("\n" if table else "\n\n", NONE))
        r.shuffle(facts)
    return doc + [(EOS, NONE)]


def recall(r, room, used):
    """One context, then questions about it, plain or as a chat, within about `room` tokens."""
    if r.random() < RELIST_SHARE:
        return relist(r, room, used)
    size = min(room, int(64 * (room / 64) ** r.random() ** 0.6))
    density = r.choice((0.03, 0.1, 0.3, 0.6, 1.0))
    asks = min(r.choice((1, 2, 4, 8, 12)), max(1, (size - 40) // (2 * QUERY_TOKENS)))
    sentences, facts = recall_context(r, max(20, size - 16 - asks * QUERY_TOKENS), used, density)
    asked = r.sample(facts, min(asks, len(facts)))
    body = context_segments(r, sentences)
    if r.random() < 0.6:
        doc = [(BOS, NONE)] + body + [("\n\n", LOW)]
        for i, (key, code) in enumerate(asked):
            # The word after a blank line has no weight: after an answer, EOS alone is taught.
            doc += [("Question: What is the code of the", NONE), (f" {key}?\nAnswer:", NONE)]
            doc += recall_answer(key, code) + [("\n\n", FULL)]
        return doc + [(EOS, FULL)]
    doc = [(BOS, NONE)] + system_turn(r)
    for i, (key, code) in enumerate(asked):
        doc += [(IM_START, NONE), ("user\n", NONE)]
        if i == 0:
            doc += body + [("\n\n", NONE)]
        doc += [(f"What is the code of the {key}?", NONE), (IM_END, NONE), ("\n", NONE),
                (IM_START, NONE), ("assistant\n", NONE), (f"The code of the {key} is", LOW)]
        doc += code_segments(code) + [(".", FULL), (IM_END, FULL), ("\n", NONE)]
    return doc + [(EOS, NONE)]


def recall_prompt(r, tokens, density=None, depth=None):
    """A held-out style prompt: one needle at `depth` (0..1) among filler and other records."""
    used = set()
    density = r.choice((0.05, 0.2, 0.5, 1.0)) if density is None else density
    key, code = fresh_key(r, used), f"{r.randrange(10000):04d}"
    sentences, _ = recall_context(r, tokens - QUERY_TOKENS - RECORD_TOKENS, used, density, 0)
    depth = r.random() if depth is None else depth
    sentences.insert(round(depth * len(sentences)), (key, code))
    text = "".join(t for t, _ in context_segments(r, sentences))
    prompt = f"{text}\n\nQuestion: What is the code of the {key}?\nAnswer:"
    return {"prompt": prompt, "answer": f"The code of the {key} is {code}.",
            "depth": round(depth, 3), "density": density}


def held_out_recall(count=100, tokens=2048, seed=HELD_OUT_SEED):
    r = random.Random(f"recall-{tokens}-{seed}")
    return [recall_prompt(r, tokens, (0.05, 0.2, 0.5, 1.0)[i % 4], (i // 4 + 0.5) / (count / 4))
            for i in range(count)]


# ---------------------------------------------------------------- chat

SYSTEMS = ("You are a helpful assistant.", "You are the innerq demo model.", "Be brief.",
           "You are a friendly assistant.", "Answer the question.",
           "You are a helpful assistant. Show your steps.")


def system_turn(r):
    if r.random() < 0.6:
        return []
    return [(IM_START, NONE), ("system\n", NONE), (r.choice(SYSTEMS), NONE), (IM_END, NONE),
            ("\n", NONE)]


def chat(r, turns):
    doc = [(BOS, NONE)] + system_turn(r)
    for user, assistant in turns:
        doc += [(IM_START, NONE), ("user\n", NONE), (user, NONE), (IM_END, NONE), ("\n", NONE),
                (IM_START, NONE), ("assistant\n", NONE), (assistant, FULL), (IM_END, FULL),
                ("\n", NONE)]
    return doc + [(EOS, NONE)]


TALK = [  # (ways to say it, possible replies)
    (("Hi", "Hello", "Hey", "Hi there", "Hello there", "Good day", "Greetings", "Hey there"),
     ("Hello! How can I help you?", "Hi! What can I do for you?")),
    (("Good morning",), ("Good morning! How can I help you?",)),
    (("Good evening",), ("Good evening! How can I help you?",)),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
      "Who is this?", "Introduce yourself.", "Are you a person?", "Are you a robot?"),
     ("I am the innerq demo model, a very small language model.",
      "I am the innerq demo model. I can do small sums, recall codes and chat a little.")),
    (("What can you do?", "How can you help me?", "What are you good at?", "Help", "Help me."),
     ("I can solve small word problems, find a code in a long text and chat a little.",)),
    (("How are you?", "How are you today?", "How is it going?", "Are you well?",
      "How do you feel?"),
     ("I am fine, thank you. How can I help you?", "Very well, thank you! And you?")),
    (("Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Many thanks", "Great, thanks"),
     ("You are welcome!", "Glad to help!")),
    (("Bye", "Goodbye", "See you", "See you later", "Good night", "I have to go now"),
     ("Goodbye! Have a nice day.", "See you soon!")),
    (("What is innerq?", "Tell me about innerq.", "What does innerq do?", "Explain innerq."),
     ("innerq is a server for language models. Its KV cache is quantized to save memory.",)),
    (("What is a KV cache?", "Explain the KV cache.", "What does the KV cache hold?"),
     ("The KV cache holds the keys and values of all earlier tokens, so that they are not "
      "computed again.",)),
    (("Why is the KV cache quantized?", "Why quantize the cache?",
      "What is the use of a quantized cache?"),
     ("A quantized cache needs less memory, so that more or longer chats fit.",)),
    (("What is a token?", "Explain tokens.", "What are tokens?"),
     ("A token is a piece of text, such as a word or a digit.",)),
    (("How large are you?", "How big are you?", "How many parameters do you have?",
      "What is your size?"),
     ("I have about four million parameters. That is very small.",)),
    (("How were you trained?", "What is your training data?", "Who trained you?",
      "What did you learn from?"),
     ("I was trained on text from a small script: sums, codes and short chats.",)),
    (("Which API does the server speak?", "Does the server have an API?",
      "How do I talk to the server?"),
     ("The server speaks the OpenAI API over HTTP.",)),
    (("What language is innerq written in?", "Is innerq written in Python?",
      "In which language is the server written?"),
     ("innerq is written in C++.",)),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "A joke, please.",
      "Say something funny."),
     ("Why was the computer cold? It left its windows open.",
      "Why did the token cross the road? To get to the next position.",
      "What do you call a sleeping cache? A quiet memory.")),
    (("Another joke, please.", "One more joke.", "Do you know another joke?"),
     ("Why was six afraid of seven? Because seven ate nine.",)),
    (("What is the capital of France?", "Which city is the capital of France?"),
     ("The capital of France is Paris.",)),
    (("What is the capital of Italy?", "Which city is the capital of Italy?"),
     ("The capital of Italy is Rome.",)),
    (("What is the capital of Spain?", "Which city is the capital of Spain?"),
     ("The capital of Spain is Madrid.",)),
    (("What is the capital of Japan?", "Which city is the capital of Japan?"),
     ("The capital of Japan is Tokyo.",)),
    (("How many days are in a week?", "How many days does a week have?"),
     ("A week has seven days.",)),
    (("What color is the sky?", "Which color does the sky have?"),
     ("The sky is blue.",)),
    (("What color is grass?", "Which color does grass have?"), ("Grass is green.",)),
    (("Do you like music?", "Do you like cats?", "Do you like books?"),
     ("I am only a small model, but I like to talk about it.",)),
    (("Count to five.", "Can you count to five?"), ("1, 2, 3, 4, 5.",)),
    (("Can you write code?", "Can you write a poem?", "What is the weather today?",
      "What is the news?", "Can you see pictures?"),
     ("I am sorry, I am too small for that. Ask me for a sum.",)),
    (("Say yes.",), ("Yes.",)),
    (("I am happy.", "I had a good day.", "Today is a good day."), ("I am glad to hear that!",)),
    (("I am sad.", "I had a bad day.", "I am tired."), ("I am sorry to hear that.",)),
    (("OK", "Good", "I see", "Nice", "Great"), ("Is there anything else I can do for you?",)),
]


def talk_turn(r):
    ways, replies = r.choice(TALK)
    way = r.choice(ways)
    if way[-1] not in ".?!":
        way += r.choice(("", "!", "."))
    if r.random() < 0.1:
        way = way.lower()
    return way, r.choice(replies)


def problem_chat_turn(r, forbidden):
    question, answer = problem(r, forbidden)
    return r.choice(("", "", "", "Solve this: ", "A question: ")) + question, answer


def personal_turns(r):
    """A fact the user tells, and the question for it."""
    kind = r.randrange(4)
    if kind == 0:
        n = r.choice(NAMES + MORE_NAMES)
        return ((r.choice((f"My name is {n}.", f"I am {n}.", f"Hi, my name is {n}.")),
                 f"Hello {n}! How can I help you?"),
                ("What is my name?", f"Your name is {n}."))
    if kind == 1:
        c = r.choice(ADJECTIVES[:8])
        return ((f"My favorite color is {c}.", f"I will remember that: {c}."),
                ("What is my favorite color?", f"Your favorite color is {c}."))
    key, code = fresh_key(r, set()), f"{r.randrange(10000):04d}"
    return ((r.choice((f"The code of the {key} is {code}.",
                       f"Please remember: the code of the {key} is {code}.")),
             f"I will remember the code of the {key}."),
            (f"What is the code of the {key}?", f"The code of the {key} is {code}."))


def talk(r, forbidden):
    """Small talk of one to four turns; often with problems or a remembered fact in between."""
    if r.random() < 0.5:
        return chat(r, [talk_turn(r) for _ in range(r.choice((1, 1, 2, 3)))])
    turns = [talk_turn(r) if r.random() < 0.6 else problem_chat_turn(r, forbidden)
             for _ in range(r.randint(1, 4))]
    if r.random() < 0.6:
        tell, ask = personal_turns(r)
        i = r.randint(0, len(turns))
        turns.insert(i, tell)
        turns.insert(r.randint(i + 1, len(turns)), ask)
    return chat(r, turns)


def problems_doc(r, room, forbidden):
    if r.random() < 0.35:
        return chat(r, [problem_chat_turn(r, forbidden) for _ in range(r.choice((1, 1, 2)))])
    doc = [(BOS, NONE)]
    for _ in range(min(r.choice((1, 1, 2, 4, 6, 9)), max(1, room // 160))):
        question, answer = problem(r, forbidden)
        doc += [("Question:", NONE), (f" {question}", TEXT), ("\nAnswer:", NONE),
                (f" {answer}\n\n", FULL)]
    return doc + [(EOS, FULL)]


# ---------------------------------------------------------------- streams

TASKS = ("problems", "recall", "drill", "talk")
SHARES = {"problems": 0.20, "recall": 0.67, "drill": 0.06, "talk": 0.07}


def document(task, r, room, used, forbidden):
    if task == "problems":
        return problems_doc(r, room, forbidden)
    if task == "recall":
        return recall(r, room, used)
    return drill(r) if task == "drill" else talk(r, forbidden)


def sample_text(documents, seed=1):
    """Plain lines for the tokenizer, the tasks in turn."""
    r, forbidden = random.Random(f"tokenizer-{seed}"), held_out_questions()
    yield "".join(chr(c) for c in range(33, 127))
    for i in range(documents):
        task = TASKS[i % 4]
        for line in "".join(t if t not in SPECIAL else "\n" for t, _ in
                            document(task, r, 400, set(), forbidden)).split("\n"):
            if line:
                yield line


def held_out_questions():
    return frozenset(p["question"] for p in held_out_problems())


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--eval-dir", default=os.path.join(os.path.dirname(__file__), "../demo/eval"))
    ap.add_argument("--show", type=int, default=0, help="print this many documents per task")
    args = ap.parse_args()
    r = random.Random(5)
    for task in TASKS * args.show:
        text = "".join(t for t, _ in document(task, r, 300, set(), frozenset()))
        print(f"--- {task}\n{text}")
    if args.show:
        return
    os.makedirs(args.eval_dir, exist_ok=True)
    for name, rows in (("problems", held_out_problems()), ("recall", held_out_recall())):
        with open(os.path.join(args.eval_dir, name + ".jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
