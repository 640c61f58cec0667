"""Lets a model call two Python functions until it answers.

    python examples/tools.py "What is the weather in Paris?"

A call is data: here it is looked up by name and checked before anything runs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, Literal

from mlx_lfm2vl import Lfm2VlError, Question, ToolCall, batch_generate, load


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict[str, Any]:
    """The weather of a city, now.

    Args:
        city: its name, such as Paris.
        unit: of the temperature.
    """
    return {"city": city, "temperature": 21 if unit == "celsius" else 70, "sky": "clear"}


def add(numbers: list[float]) -> float:
    """The sum of some numbers.

    Args:
        numbers: at least one.
    """
    return sum(numbers)


FUNCTIONS = {function.__name__: function for function in (get_weather, add)}


def run_call(call: ToolCall) -> str:
    """What a function returns, as JSON text; what goes wrong is told to the model."""
    if call.name not in FUNCTIONS:
        return json.dumps({"error": f"there is no tool {call.name}"})
    try:
        return json.dumps(FUNCTIONS[call.name](**call.arguments))
    except (TypeError, ValueError) as error:
        return json.dumps({"error": str(error)})


def main() -> None:
    parser = argparse.ArgumentParser(description="A small tool loop.")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="LiquidAI/LFM2.5-VL-450M")
    parser.add_argument("--turns", type=int, default=4, help="answers at most (default: 4)")
    args = parser.parse_args()
    try:
        model, processor = load(args.model)
        messages: list[dict[str, Any]] = [{"role": "user", "content": args.prompt}]
        for _ in range(args.turns):
            [answer] = batch_generate(
                model, processor, [Question(messages, tools=[*FUNCTIONS.values()])]
            )
            print(answer.text)
            if not answer.tool_calls:
                break
            calls = [call.to_dict() for call in answer.tool_calls]
            messages.append({"role": "assistant", "tool_calls": calls})
            for call in answer.tool_calls:
                result = run_call(call)
                print(f"{call.name}: {result}")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    except Lfm2VlError as error:
        parser.exit(2, f"tools.py: error: {error}\n")


if __name__ == "__main__":
    main()
