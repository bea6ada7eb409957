package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// Exit codes, as the help of the command says.
const (
	exitFailure  = 1
	exitUsage    = 2
	exitNotFound = 3
	// exitInterrupted is 128 plus the number of SIGINT, as shells have it.
	exitInterrupted = 130
)

// terminal is where the command reads and writes.
type terminal struct {
	in       io.Reader
	out, err io.Writer
}

// interactive reports whether somebody can be asked.
func (t terminal) interactive() bool {
	return isTerminal(t.in)
}

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// cli holds what all commands share.
type cli struct {
	terminal
	root       string
	runtimeDir string
	output     string
}

// usageError is a mistake in the arguments.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// errSilent has been told already.
var errSilent = errors.New("failed")

// errInterrupted is what a command returns that a signal ended in the middle.
var errInterrupted = errors.New("interrupted")

// run is the command; it returns its exit code.
func run(ctx context.Context, args []string, t terminal) int {
	logrus.SetOutput(t.err)
	logrus.SetLevel(logrus.WarnLevel)
	c := &cli{terminal: t}
	cmd := c.command()
	cmd.SetArgs(args)
	cmd.SetIn(t.in)
	cmd.SetOut(t.out)
	cmd.SetErr(t.err)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var usage usageError
	if !errors.Is(err, errSilent) {
		fmt.Fprintln(t.err, "stasis:", clean(err.Error()))
		if errors.As(err, &usage) {
			fmt.Fprintln(t.err, "Run stasis --help, or stasis COMMAND --help.")
		}
	}
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, errInterrupted):
		return exitInterrupted
	case errdefs.IsNotFound(err):
		return exitNotFound
	}
	return exitFailure
}

func (c *cli) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "stasis",
		Short: "Look after the checkpoints of this node's containers",
		Long: `stasis shows and removes the checkpoints of the containers of this node, tells
what became of each stop and start, and checks whether the node and its
containers are fit for checkpoints. It needs root: a checkpoint holds the memory
of its container.

A checkpoint is named by its ID, or by the beginning of it if no other one
begins so. Tables are for people; scripts should use --output json.

Exit codes:
  0  done
  1  failed, or (doctor, verify) something is wrong
  2  the arguments make no sense
  3  there is no such checkpoint or store
  130  interrupted in the middle (prepare-reboot)`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usage(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if c.output != "table" && c.output != "json" {
				return usageError{fmt.Errorf("--output %q: want table or json", c.output)}
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := root.PersistentFlags()
	f.StringVar(&c.root, "root", "/var/lib/stasis", "directory of the store")
	f.StringVar(&c.runtimeDir, "runtime-dir", "/run/stasis", "directory of the daemon's socket")
	f.StringVarP(&c.output, "output", "o", "table", "table or json")
	if err := root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag is defined above
	}
	root.AddCommand(c.lsCommand(), c.inspectCommand(), c.rmCommand(), c.gcCommand(), c.verifyCommand(),
		c.eventsCommand(), c.exportCommand(), c.importCommand(), c.coreCommand(), c.doctorCommand(), c.statusCommand(), c.prepareRebootCommand(), c.templateCommand(), c.versionCommand())
	return root
}

func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{err}
		}
		return nil
	}
}

// open opens the store, which must be there: only the daemon makes one.
func (c *cli) open() (*store.Store, error) {
	if _, err := os.Lstat(c.root); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no store at %s; was stasisd ever started here, or is --root wrong? %w", c.root, errdefs.ErrNotFound)
	} else if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w; run this as root", err)
	}
	st, err := store.Open(fsys.OS{}, c.root)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, checkpoint.ErrInvalid) && os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w; run this as root", err)
	}
	return st, err
}

// resolve finds the one record whose ID begins with name.
func resolve(ctx context.Context, st *store.Store, name string) (store.Record, error) {
	records, err := st.List(ctx)
	if err != nil {
		return store.Record{}, err
	}
	var found []store.Record
	for _, r := range records {
		if r.ID != "" && name != "" && strings.HasPrefix(string(r.ID), name) {
			found = append(found, r)
		}
	}
	switch len(found) {
	case 0:
		return store.Record{}, fmt.Errorf("%q: %w; stasis ls shows what there is", name, checkpoint.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return store.Record{}, usageError{fmt.Errorf("%q is the beginning of %d checkpoints' IDs; give more of it", name, len(found))}
}

// completeIDs offers the IDs in the store to the shell.
func (c *cli) completeIDs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	st, err := c.open()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	records, err := st.List(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var ids []string
	for _, r := range records {
		if r.ID != "" {
			what := string(r.State)
			if r.Manifest != nil {
				what = r.Manifest.Identity.String()
			}
			ids = append(ids, string(r.ID)+"\t"+clean(what))
		}
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// printJSON prints one value.
func (c *cli) printJSON(v any) error {
	e := json.NewEncoder(c.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if c.output == "json" {
				return c.printJSON(map[string]any{"version": version, "formatVersion": checkpoint.FormatVersion})
			}
			_, err := fmt.Fprintf(c.out, "stasis %s, checkpoint format %d\n", version, checkpoint.FormatVersion)
			return err
		},
	}
}
