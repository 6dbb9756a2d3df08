"""The first thing to try: three prompts through one engine, with the bundled model."""

from apportion import LLM, SamplingParams

prompts = ["The detective looked at the", "Once upon a time", "A function in Python is"]
with LLM() as llm:
    for output in llm.generate(prompts, SamplingParams(temperature=0.7, top_p=0.95, max_tokens=48, seed=7)):
        print(f"\n{output.prompt}|{output.outputs[0].text}")
        metrics = output.metrics
        print(f"  [{len(output.outputs[0].token_ids)} tokens, first after {1e3 * metrics.time_to_first_token:.0f} ms]")
