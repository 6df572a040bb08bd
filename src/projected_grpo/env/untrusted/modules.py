"""What a completion may import, the same on every machine. Names only: nothing here runs or imports anything.

A template of few modules forks faster, so there are two of them; the trusted side takes the second, which has all of
these, where a completion imports one of RARE or might do so under a name made at run time.
"""

COMMON = """
__future__ _strptime abc array bisect calendar cmath codecs collections collections.abc contextlib copy
dataclasses datetime decimal enum errno fractions functools gc heapq io itertools json keyword math numbers
operator os os.path queue random re reprlib stat statistics string struct sys textwrap threading time types
typing warnings weakref encodings.ascii encodings.cp1252 encodings.idna encodings.latin_1 encodings.punycode
encodings.unicode_escape encodings.utf_16 encodings.utf_32 encodings.utf_8_sig
"""
RARE = """
_pydecimal argparse ast asyncio base64 binascii concurrent.futures concurrent.futures.process
concurrent.futures.thread csv ctypes difflib doctest getpass graphlib hashlib html importlib importlib.util
inspect linecache locale logging multiprocessing multiprocessing.pool pathlib pickle platform pprint resource
sched secrets select shutil signal socket subprocess tempfile timeit tokenize traceback unicodedata unittest
unittest.mock uuid zlib zoneinfo
"""
