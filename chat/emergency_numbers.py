"""Which numbers a warning names: what the user says, else those of the user's country, else the default.

The country comes from the locale (``LC_ALL``, ``LC_MESSAGES``, ``LANG``, as in "de_AT.UTF-8"), which is a guess: many
machines keep en_US wherever they are. So a warning also says that another number may hold, and ``--emergency-number``
or the environment's ``MEDCOT_EMERGENCY_NUMBER`` and ``MEDCOT_COUNTRY`` settle it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from chat.red_flag_rules import Numbers, Rules
from pipeline.errors import MedcotError

_TERRITORY = re.compile(r"[A-Za-z]{2,3}_([A-Z]{2})\b")
_NUMBER = re.compile(r"[0-9+][0-9 +/()-]{1,19}")


def numbers_for(
    rules: Rules,
    emergency_number: str | None = None,
    country: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Numbers:
    """``country`` is its ISO 3166 code of two letters.

    Raises MedcotError for a country the rules do not have and for a number that cannot be dialled.
    """
    country = country or environment.get("MEDCOT_COUNTRY")
    emergency_number = emergency_number or environment.get("MEDCOT_EMERGENCY_NUMBER")
    if country is not None and country.upper() not in rules.numbers_by_country:
        raise MedcotError(
            f"There are no emergency numbers for the country {country!r}: known are "
            f"{', '.join(sorted(rules.numbers_by_country))}; for another give --emergency-number."
        )
    if emergency_number is not None and not _NUMBER.fullmatch(emergency_number.strip()):
        raise MedcotError(f"{emergency_number!r:.40} is no telephone number: write it as it is dialled, such as 112.")
    code = country.upper() if country else _locale_country(environment)
    numbers = rules.numbers_by_country.get(code or "", rules.default_numbers)
    if emergency_number is None:
        return numbers
    return numbers.model_copy(update={"emergency_number": emergency_number.strip()})


def _locale_country(environment: Mapping[str, str]) -> str | None:
    locale = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")
    found = _TERRITORY.match(locale)
    return found[1] if found else None
