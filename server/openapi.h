// The description of the HTTP API.
#pragma once

namespace innerq {

// Text of server/openapi.json, an OpenAPI 3.1 document: every route, parameter, answer and status.
extern const char* const kOpenApi;

}  // namespace innerq
