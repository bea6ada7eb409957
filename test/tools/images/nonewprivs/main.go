// Command nonewprivs prints its effective user. It is installed set-user-ID root, so that the answer
// says whether the container may gain privileges.
package main

import (
	"fmt"
	"os"
)

func main() { fmt.Printf("Effective uid: %d\n", os.Geteuid()) }
