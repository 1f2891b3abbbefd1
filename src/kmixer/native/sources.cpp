// Which sources a build was made from, so that native/__init__.py can tell an old build from a new one.

extern "C" const char* sources_digest() { return SOURCES_DIGEST; }
