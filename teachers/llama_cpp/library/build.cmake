# How llama-cpp-python is compiled, beyond its own settings: `make` and the pip command in README.md give this file
# to CMake as CMAKE_PROJECT_llama_cpp_INCLUDE.
#
# GCC's _tile_loadconfig tells the optimizer that it reads 8 bytes of the tile configuration; the instruction reads
# 64. GCC therefore drops, as dead, the stores of the other 56, and the first product of an AMX processor faults
# (ggml-org/llama.cpp#20824). Without dead-store elimination they stay. Only the one file that loads the
# configuration is compiled so, and only by GCC: Clang knows the instruction's operand, and refuses these options.
# Without AMX in the target that file is empty, so nothing changes there.
function(distill_keep_tile_configuration)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    return()
  endif()
  set(ggml "${CMAKE_SOURCE_DIR}/vendor/llama.cpp/ggml/src")
  set(source "${ggml}/ggml-cpu/amx/mmq.cpp")
  if(NOT TARGET ggml OR NOT EXISTS "${source}")
    message(WARNING "${source} is not compiled here: `distill doctor` says whether AMX works")
    return()
  endif()
  set_source_files_properties(
    "${source}" DIRECTORY "${ggml}" PROPERTIES COMPILE_OPTIONS "-fno-dse;-fno-tree-dse"
  )
endfunction()

# Properties of a source file are set in the folder that compiles it, which is known at the end only.
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL distill_keep_tile_configuration)
