"""The comparison string: seven emoji that two people read to each other.

Whoever stands between the two has one chance in 2^42 that they see the same. PROTOCOL.md,
"Comparison string".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from connectoid.suite import CONTEXTS, signing_input

# Those of the Matrix specification, "SAS method: emoji", in its order.
_EMOJI = (
    "🐶 Dog|🐱 Cat|🦁 Lion|🐎 Horse|🦄 Unicorn|🐷 Pig|🐘 Elephant|🐰 Rabbit|🐼 Panda|🐓 Rooster|"
    "🐧 Penguin|🐢 Turtle|🐟 Fish|🐙 Octopus|🦋 Butterfly|🌷 Flower|🌳 Tree|🌵 Cactus|🍄 Mushroom|"
    "🌏 Globe|🌙 Moon|☁️ Cloud|🔥 Fire|🍌 Banana|🍎 Apple|🍓 Strawberry|🌽 Corn|🍕 Pizza|🎂 Cake|"
    "❤️ Heart|😀 Smiley|🤖 Robot|🎩 Hat|👓 Glasses|🔧 Spanner|🎅 Santa|👍 Thumbs Up|☂️ Umbrella|"
    "⌛ Hourglass|⏰ Clock|🎁 Gift|💡 Light Bulb|📕 Book|✏️ Pencil|📎 Paperclip|✂️ Scissors|🔒 Lock|"
    "🔑 Key|🔨 Hammer|☎️ Telephone|🏁 Flag|🚂 Train|🚲 Bicycle|✈️ Aeroplane|🚀 Rocket|🏆 Trophy|"
    "⚽ Ball|🎸 Guitar|🎺 Trumpet|🔔 Bell|⚓ Anchor|🎧 Headphones|📁 Folder|📌 Pin"
)
EMOJI: Sequence[tuple[str, str]] = tuple(re.findall(r"([^ |]+) ([^|]+)", _EMOJI))

# Seven of six bits each: 42 bits.
COMPARED = 7
_BITS = 6


def comparison_string(invitation: str, hello: str, inviter: str, r: str) -> tuple[int, ...]:
    """Return seven indexes of EMOJI for the texts as they were sent.

    Of a hello only what is signed counts: it may be given with its proof or without.
    """
    texts = (invitation, signing_input(hello), inviter, r)
    parts = [text.encode("ascii") for text in texts]
    digest = hashlib.sha256(b"\0".join([CONTEXTS["emoji"], *parts])).digest()
    bits = int.from_bytes(digest, "big") >> (8 * len(digest) - _BITS * COMPARED)
    numbers: list[int] = []
    for place in reversed(range(COMPARED)):
        numbers.append((bits >> (_BITS * place)) % len(EMOJI))
    return tuple(numbers)
