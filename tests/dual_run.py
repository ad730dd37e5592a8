"""forget.py, with `dual=true` for a method that has a dual variable whatever its YAML says, for test_rules.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forget
from app.compose import given

words = [word for word in sys.argv[1:] if word != "dual=true"]
settings = given("forget", words)
if "dual=true" in sys.argv:
    dual = {"start": 0.5, "eps": 0.5, "eta": 0.3, "warmup": 0.4}
    settings = settings.model_copy(update={"method": settings.method.model_copy(update={"dual": dual})})
forget.run(settings)
