# Writes OUTPUT, a C++ source that defines innerq::kConfigSchema as the text of INPUT.
file(READ ${INPUT} text)
file(WRITE ${OUTPUT}
"// Generated from configs/schema.json.
namespace innerq {
extern const char* const kConfigSchema;
const char* const kConfigSchema = R\"innerq_schema(${text})innerq_schema\";
}  // namespace innerq
")
