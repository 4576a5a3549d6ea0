# Writes OUTPUT, a C++ source that defines innerq::NAME as the text of INPUT.
file(READ ${INPUT} text)
file(WRITE ${OUTPUT}
"// Generated from ${INPUT}.
namespace innerq {
extern const char* const ${NAME};
const char* const ${NAME} = R\"innerq_text(${text})innerq_text\";
}  // namespace innerq
")
