"""Words for signs: two to five capitals, real ones and pronounceable inventions."""

from __future__ import annotations

from .dice import Dice
from .letters import ALPHABET

REAL = tuple(
    """
    ART BAKE BAND BANK BAR BARN BEE BELL BIKE BIRD BLUE BOAT BOOK BOX BREAD BUS CAFE CAKE CAMP CANDY
    CARD CASH CAT CHEF CITY CLUB COCOA CORN COW CUBE CUP DANCE DAY DESK DINER DOG DOOR DUCK EAST EGG
    EXIT FARM FAST FIG FILM FISH FLAG FOOD FOX FREE FROG FUN GAME GATE GIFT GLASS GOAT GOLD GRAPE
    GREEN GYM HALT HAT HELLO HELP HERB HILL HOME HONEY HOTEL HOUSE ICE INN ISLE JAM JAZZ JET JUICE
    JUMP KEY KING KITE KIWI LAKE LAMP LEFT LEMON LIME LION LOVE LUCK LUNCH MAGIC MAIL MAP MARKET
    MEAL MELON MENU MILK MINT MOON MUSIC NEST NEW NEXT NICE NIGHT NORTH NUT OAK OPEN OVEN OWL PARK
    PEACH PEAR PET PIE PIZZA PLAY PLUM POOL PORT PUB PUMP QUICK QUIET QUIZ RADIO RAIN RED REST RICE
    RING RIVER ROAD ROBOT ROCK ROSE SALE SEA SHIP SHOE SHOP SKY SLOW SNOW SOAP SOUP SOUTH SPA STAR
    STOP SUN SUSHI SWAN SWIM TACO TAXI TEA TIGER TOY TRAIN TREE TRUCK VAN VASE VIEW VINE VOTE WALK
    WARM WATER WAVE WEST WHALE WIND WINE WOLF WOOD YARN YES YOGA ZEBRA ZERO ZONE ZOO NO GO UP ON OK
    HI WE OX
    """.split()
)
_VOWELS, _CONSONANTS = "AEIOU", "BCDFGHJKLMNPRSTVWXYZ"


def word(dice: Dice) -> str:
    """A word: half of them real, the others invented, a few of them any letters at all."""
    style = dice.unit()
    if style < 0.5:
        return dice.pick([w for w in REAL if len(w) <= 5])
    length = dice.weighted({2: 0.1, 3: 0.3, 4: 0.35, 5: 0.25})
    if style > 0.8:
        return "".join(dice.pick(ALPHABET) for _ in range(length))
    first = dice.below(2)
    return "".join(dice.pick(_VOWELS if (k + first) % 2 else _CONSONANTS) for k in range(length))
