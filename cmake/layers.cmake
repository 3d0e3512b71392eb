# SPDX-License-Identifier: LGPL-2.1-or-later
# Each layer is a static library whose headers are reached as "layer/name.h" through an include path that holds this one
# layer only, so that an include of a layer that is not linked does not compile (docs/ARCHITECTURE.md).
#
#   qpull_layer(NAME DIR folder SOURCES a.c b.c USES other-layer… PkgConfig::X …)
function(qpull_layer name)
    cmake_parse_arguments(ARG "" "DIR" "SOURCES;USES" ${ARGN})
    add_library(${name} STATIC ${ARG_SOURCES})
    set(farm ${CMAKE_BINARY_DIR}/layers/${name})
    file(MAKE_DIRECTORY ${farm})
    file(CREATE_LINK ${CMAKE_CURRENT_SOURCE_DIR} ${farm}/${ARG_DIR} SYMBOLIC)
    target_include_directories(${name} PUBLIC ${farm})
    target_link_libraries(${name} PUBLIC ${ARG_USES})
endfunction()
