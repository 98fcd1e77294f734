from data.village import main

main()
