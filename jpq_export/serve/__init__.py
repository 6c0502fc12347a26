"""`jpq-export serve`: a bundle behind the OpenAI HTTP interface. Needs the extra `serve`; loads no torch."""
