"""Our models inside other projects' programs; each module needs that project only when it is used."""
