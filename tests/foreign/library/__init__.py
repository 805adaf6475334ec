import a_framework_not_here

a_framework_not_here.register("library")
VERSION = a_framework_not_here.version()
