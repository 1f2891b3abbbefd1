"""`kmixer serve`: a model over HTTP, in the form of OpenAI's completions. Needs kmixer[serve]."""
