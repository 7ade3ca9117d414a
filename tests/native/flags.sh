# Sourced by the scripts of this folder, from it. flags[TARGET]: the compiler flags of each target, as CMakeLists.txt sets
# them for g++. drivers FOLDER: the sources there that the compare programs need.
declare -A flags=()
while read -r target words; do
  flags[$target]+=""
  for word in $words; do
    case $word in
      \"\") ;;
      \$\{NYBBLE_FLAGS_*) word=${word#*FLAGS_} && flags[$target]+=${flags[${word%\}}]} ;;
      *) flags[$target]+=" $word" ;;
    esac
  done
done < <(sed -nE 's/^(set\(|  list\(APPEND )NYBBLE_FLAGS_(\w+) ([^)]*)\).*/\2 \3/p' ../../CMakeLists.txt)
drivers() {
  local file
  for file in "$1"/*.cpp; do
    case $(basename "$file") in
      bindings*.cpp | plan.cpp | aot.cpp | no_python.cpp | cpu_features.cpp | probe.cpp) ;;
      *) echo "$file" ;;
    esac
  done
}
