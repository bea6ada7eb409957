package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

func (c *cli) templateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "template",
		Short: "Make templates of running containers, and look after them",
		Long: `template makes a template of a container that runs, and lets it run on. The
containers of the same namespace that are annotated with
stasis.dev/template: NAME begin from it, where image and spec are the same.

A template is named NAMESPACE/NAME, one version of it NAMESPACE/NAME@VERSION,
where the beginning of the version is enough. New containers begin from the
newest version; older ones are removed when no container is being created from
them. A template holds the memory of its source, with all secrets in it.`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.templateCreateCommand(), c.templateLsCommand(), c.templateInspectCommand(), c.templateRmCommand(), c.templateVerifyCommand())
	return cmd
}

// source is the container that becomes a template.
type source struct {
	state           string // containerd's directory
	namespace, pod  string
	container       string // empty for the only one
	wait, everyTime time.Duration
	warmup          warmup
}

func (c *cli) templateCreateCommand() *cobra.Command {
	s := source{everyTime: 200 * time.Millisecond}
	var pod string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "create NAME --pod NAMESPACE/POD",
		Short: "Make a template of a running container",
		Long: `create freezes a container, dumps it, lets it run on, and makes the dump the
newest version of the template. The container must have opted in, by
stasis.dev/policy: template, or any other policy but off.

Before the dump, commands (--warmup-exec) are run in the container, with its own
user and rights, and URLs (--warmup-url) are fetched from it, --warmup-count times
one after the other. The host of a URL is localhost or pod, which both mean the
pod's own address; redirects are not followed, certificates not checked. An exit
code of 0 and an answer of 200 to 399 are good, anything else is a failure, and no
template is made. Within --wait, failures before the first success only mean that
the container is not ready yet: the kubelet's own probes are not known here.`,
		Example: `  stasis template create shop --pod default/shop-7d9c6b5f4-x2x9z
  stasis template create shop --pod default/shop-0 --container app --wait 2m
  stasis template create shop --pod default/shop-0 --wait 2m --warmup-url http://localhost:8080/ --warmup-count 200
  stasis template create shop --pod default/shop-0 --warmup-exec '["/app/warmup", "--all"]'`,
		Args:              usage(cobra.ExactArgs(1)),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkpoint.ValidateTemplateName(args[0]); err != nil {
				return usageError{fmt.Errorf("template: %w", err)}
			}
			var ok bool
			if s.namespace, s.pod, ok = strings.Cut(pod, "/"); !ok || s.namespace == "" || s.pod == "" {
				return usageError{fmt.Errorf("--pod %q: want NAMESPACE/POD", pod)}
			}
			if timeout <= 0 || s.wait < 0 {
				return usageError{errors.New("--timeout and --wait: want more than nothing")}
			}
			if err := s.warmup.parse(); err != nil {
				return err
			}
			if _, err := c.open(); err != nil {
				return err
			}
			return c.createTemplate(cmd.Context(), args[0], s, timeout)
		},
	}
	f := cmd.Flags()
	f.StringVar(&pod, "pod", "", "namespace and name of the pod")
	f.StringVar(&s.container, "container", "", "name of the container, where the pod has several that opted in")
	f.DurationVar(&s.wait, "wait", 0, "how long to wait for the container to run, and for its warm-up to work")
	f.StringArrayVar(&s.warmup.exec, "warmup-exec", nil, "command to run in the container before the dump: for its shell, or a JSON list")
	f.StringArrayVar(&s.warmup.url, "warmup-url", nil, "URL to fetch from the pod before the dump, as http://localhost:8080/")
	f.IntVar(&s.warmup.count, "warmup-count", 1, "how often")
	f.DurationVar(&s.warmup.timeout, "warmup-timeout", 30*time.Second, "how long each command or request may take")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "how long the dump may take")
	f.StringVar(&s.state, "containerd-state", "/run/containerd", "containerd's state directory")
	return cmd
}

func (c *cli) createTemplate(ctx context.Context, name string, s source, timeout time.Duration) error {
	ready := time.Now().Add(s.wait)
	ctr, err := s.find(ctx)
	if err != nil {
		return err
	}
	progress := func(text string) { fmt.Fprintln(c.err, clean(text)) }
	if err := s.warmup.run(ctx, &ctr, ready, s.everyTime, progress); err != nil {
		return fmt.Errorf("container %s of pod %s/%s: %w", ctr.Identity.Container, s.namespace, s.pod, err)
	}
	dump, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := ctr.Snapshot(dump, name)
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errInterrupted, err)
	}
	if errdefs.IsNotImplemented(err) {
		err = fmt.Errorf("its shim is of an older release; create the pod again: %w", err)
	}
	if err != nil {
		return err
	}
	ref := store.TemplateRef{Namespace: s.namespace, Name: name, Version: r.CheckpointID}
	if c.output == "json" {
		return c.printJSON(struct {
			store.TemplateRef
			Source checkpoint.Identity `json:"source"`
			control.Result
		}{ref, ctr.Identity, r})
	}
	frozen := r.Timings.FreezeMicros + r.Timings.CRIUMicros + r.Timings.CopyMicros
	_, err = fmt.Fprintf(c.out, "%s\n%s in %s, of which container %s stood still for %s\n", ref, size(r.SizeBytes),
		r.Duration.Round(time.Millisecond), clean(ctr.Identity.Container), micros(frozen))
	return err
}

// find waits for the one container that is meant, and that runs.
func (s source) find(ctx context.Context) (reboot.Container, error) {
	end := time.Now().Add(s.wait)
	for {
		found, err := s.look(ctx)
		if err != nil {
			return reboot.Container{}, err
		}
		switch {
		case len(found) == 1:
			return found[0], nil
		case len(found) > 1:
			var names []string
			for _, f := range found {
				names = append(names, f.Identity.Container)
			}
			slices.Sort(names)
			return reboot.Container{}, usageError{fmt.Errorf("pod %s/%s has several containers that opted in (%s); name one with --container", s.namespace, s.pod, strings.Join(names, ", "))}
		case time.Now().After(end):
			what := "no container"
			if s.container != "" {
				what = "no container " + s.container
			}
			return reboot.Container{}, fmt.Errorf("%s of pod %s/%s runs here that opted in (%s: %s): %w",
				what, s.namespace, s.pod, checkpoint.AnnotationPolicy, checkpoint.PolicyTemplate, errdefs.ErrNotFound)
		}
		select {
		case <-ctx.Done():
			return reboot.Container{}, fmt.Errorf("%w: no template was made", errInterrupted)
		case <-time.After(s.everyTime):
		}
	}
}

// look lists the containers that may be meant, and that run.
func (s source) look(ctx context.Context) ([]reboot.Container, error) {
	all, err := reboot.Find(ctx, s.state)
	if err != nil {
		return nil, err
	}
	var found []reboot.Container
	for _, f := range all {
		if f.Err != nil || f.Identity.Namespace != s.namespace || f.PodName != s.pod || s.container != "" && f.Identity.Container != s.container {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		st, err := f.Status(ctx)
		cancel()
		if errdefs.IsNotFound(err) || err == nil && st.State == control.Stopped {
			continue // of an earlier sandbox, or refused by the shim
		}
		if err != nil {
			return nil, fmt.Errorf("container %s of pod %s/%s: %w", f.Identity.Container, s.namespace, s.pod, err)
		}
		found = append(found, f)
	}
	return found, nil
}

// templateJSON is the machine-readable form of a version.
type templateJSON struct {
	store.TemplateRef
	Newest   bool                 `json:"newest"`
	Path     string               `json:"path"`
	Pins     []store.Owner        `json:"pins,omitempty"`
	Error    string               `json:"error,omitempty"`
	Manifest *checkpoint.Manifest `json:"manifest,omitempty"`
}

func (c *cli) templateLsCommand() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the templates",
		Example: `  stasis template ls
  stasis template ls -n default -o json`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := c.open()
			if err != nil {
				return err
			}
			all, err := st.Templates(cmd.Context())
			if err != nil {
				return err
			}
			all = slices.DeleteFunc(all, func(t store.Template) bool { return namespace != "" && t.Namespace != namespace })
			if c.output == "json" {
				list := []templateJSON{}
				for _, t := range all {
					j := templateJSON{TemplateRef: t.TemplateRef, Newest: t.Newest, Path: t.Path, Pins: t.Pins, Manifest: t.Manifest}
					if t.Err != nil {
						j.Error = t.Err.Error()
					}
					list = append(list, j)
				}
				return c.printJSON(list)
			}
			table := newTable(c.out, "TEMPLATE", "VERSION", "SOURCE", "IMAGE", "AGE", "SIZE", "NOTE")
			for _, t := range all {
				row := []string{t.Namespace + "/" + t.Name, string(t.Version), "", "", "", "", ""}
				if m := t.Manifest; m != nil {
					row[2], row[3], row[4], row[5] = m.PodName+"/"+m.Identity.Container, m.ImageName, age(m.CreatedAt), size(m.Sizes.TotalBytes)
				}
				switch {
				case t.Err != nil:
					row[6] = t.Err.Error()
				case len(t.Pins) > 0:
					row[6] = fmt.Sprintf("%d being created from it", len(t.Pins))
				case !t.Newest:
					row[6] = "superseded"
				}
				table.row(row...)
			}
			return table.flush()
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only those of this namespace")
	return cmd
}

// resolveTemplate lists the versions that NAMESPACE/NAME[@VERSION] names, the
// newest last.
func resolveTemplate(ctx context.Context, st *store.Store, name string) ([]store.Template, error) {
	base, version, exact := strings.Cut(name, "@")
	if namespace, template, ok := strings.Cut(base, "/"); !ok ||
		checkpoint.ValidateTemplateName(namespace) != nil || checkpoint.ValidateTemplateName(template) != nil || exact && version == "" {
		return nil, usageError{fmt.Errorf("%q: want NAMESPACE/NAME or NAMESPACE/NAME@VERSION", name)}
	}
	all, err := st.Templates(ctx)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(t store.Template) bool {
		return t.Namespace+"/"+t.Name != base || !strings.HasPrefix(string(t.Version), version)
	})
	switch {
	case len(all) == 0:
		return nil, fmt.Errorf("there is no template %s; stasis template ls shows what there is: %w", name, errdefs.ErrNotFound)
	case exact && len(all) > 1:
		return nil, usageError{fmt.Errorf("%q is the beginning of %d versions; give more of it", name, len(all))}
	}
	return all, nil
}

// completeTemplates offers the names of templates to the shell.
func (c *cli) completeTemplates(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	st, err := c.open()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	all, err := st.Templates(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, t := range all {
		if t.Newest {
			names = append(names, t.Namespace+"/"+t.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (c *cli) templateInspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect NAMESPACE/NAME[@VERSION]",
		Short: "Show what a template holds",
		Long: `inspect shows what stasis inspect shows of a checkpoint: of the newest version,
or of the one that is named.`,
		Example:           `  stasis template inspect default/shop`,
		Args:              usage(cobra.ExactArgs(1)),
		ValidArgsFunction: c.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := c.open()
			if err != nil {
				return err
			}
			all, err := resolveTemplate(cmd.Context(), st, args[0])
			if err != nil {
				return err
			}
			t := all[len(all)-1]
			r := store.Record{ID: t.Version, State: store.Committed, Path: t.Path, Manifest: t.Manifest, Err: t.Err}
			if errors.Is(t.Err, checkpoint.ErrCorrupt) {
				r.State = store.Corrupt
			}
			return c.inspect(r, parts{true, true, true, true})
		},
	}
}

func (c *cli) templateRmCommand() *cobra.Command {
	var dryRun, yes bool
	cmd := &cobra.Command{
		Use:     "rm NAMESPACE/NAME[@VERSION]...",
		Aliases: []string{"remove"},
		Short:   "Remove templates",
		Long: `rm removes all versions of a template, or the one that is named. Containers that
began from it are not affected; new ones start cold. A version from which a
container is just being created is not removed. On a terminal rm asks first.`,
		Example: `  stasis template rm default/shop
  stasis template rm --dry-run default/shop@0123`,
		Args:              usage(cobra.MinimumNArgs(1)),
		ValidArgsFunction: c.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := c.open()
			if err != nil {
				return err
			}
			var all []store.Template
			var removals []removalJSON
			for _, name := range args {
				found, err := resolveTemplate(cmd.Context(), st, name)
				if err != nil {
					return err
				}
				for _, t := range found {
					j := removalJSON{ID: t.Version, Reason: "template " + t.Namespace + "/" + t.Name}
					if m := t.Manifest; m != nil {
						j.Identity, j.SizeBytes = &m.Identity, m.Sizes.TotalBytes
					}
					all, removals = append(all, t), append(removals, j)
				}
			}
			if dryRun {
				return c.printRemovals(removals, true)
			}
			if !yes && c.interactive() {
				for _, t := range all {
					fmt.Fprintln(c.err, t.TemplateRef)
				}
				fmt.Fprintf(c.err, "Remove these %d versions? [y/N] ", len(all))
				answer, err := bufio.NewReader(c.in).ReadString('\n')
				if err != nil || !strings.EqualFold(strings.TrimSpace(answer), "y") {
					return errors.New("nothing was removed")
				}
			}
			for i := range removals {
				if err := st.RemoveTemplate(cmd.Context(), all[i].TemplateRef); err != nil {
					return errors.Join(err, c.printRemovals(removals[:i], false))
				}
				removals[i].Removed = true
				if err := c.tellRemoved(removals[i], "stasis template rm"); err != nil {
					return err
				}
			}
			return c.printRemovals(removals, false)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be removed")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (c *cli) templateVerifyCommand() *cobra.Command {
	var every bool
	cmd := &cobra.Command{
		Use:   "verify {NAMESPACE/NAME[@VERSION]... | --all}",
		Short: "Read templates and compare their checksums",
		Long: `verify does for templates what stasis verify does for checkpoints. Nothing is
changed: the shim verifies a template again whenever a container begins from it,
and sets a damaged one aside.`,
		Example: `  stasis template verify default/shop
  stasis template verify --all`,
		Args: func(_ *cobra.Command, args []string) error {
			if every == (len(args) > 0) {
				return usageError{errors.New("give names, or --all")}
			}
			return nil
		},
		ValidArgsFunction: c.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := c.open()
			if err != nil {
				return err
			}
			var all []store.Template
			if every {
				if all, err = st.Templates(cmd.Context()); err != nil {
					return err
				}
			}
			for _, name := range args {
				found, err := resolveTemplate(cmd.Context(), st, name)
				if err != nil {
					return err
				}
				all = append(all, found...)
			}
			type result struct {
				store.TemplateRef
				OK    bool   `json:"ok"`
				Error string `json:"error,omitempty"`
			}
			results, bad := []result{}, false
			for _, t := range all {
				res := result{TemplateRef: t.TemplateRef, OK: true}
				if err := st.VerifyTemplate(cmd.Context(), t.TemplateRef); err != nil {
					if cmd.Context().Err() != nil {
						return err
					}
					res.OK, res.Error, bad = false, err.Error(), true
				}
				results = append(results, res)
				if c.output == "table" {
					if res.OK {
						res.Error = "ok"
					}
					fmt.Fprintf(c.out, "%s  %s\n", res.TemplateRef, clean(res.Error))
				}
			}
			if c.output == "json" {
				if err := c.printJSON(results); err != nil {
					return err
				}
			}
			if bad {
				return errSilent
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&every, "all", false, "all of the store")
	return cmd
}
