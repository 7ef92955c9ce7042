"""Importers: traces of other projects, and logs, as traces of ours.

* ``interface``: what an importer is; ``registry`` lists them.
* ``stream2llm_crawler``, ``stream2llm_anns``, ``mooncake``, ``burstgpt``, ``azure``,
  ``openai_messages``: one importer each.
* ``convert``: runs one and writes the trace file.

`docs/traces_import.md` describes each format and how it is mapped.
"""
