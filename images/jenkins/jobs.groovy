// Made by `python -m airloom.stack.jenkins`: change that, not this. One line of the list is one repo: OWNER/NAME.
def file = new File(System.getenv('AIRLOOM_JENKINS_REPOS') ?: '/none')
def names = file.exists() ? file.readLines('UTF-8') : []
names.findAll { it ==~ '[A-Za-z0-9._-]+/[A-Za-z0-9._-]+' }.each { name ->
  pipelineJob(name.split('/')[1]) {
    description('Builds what is pushed to ' + name + ' with `airloom build`, and says on the commit how it went.')
    properties {
      pipelineTriggers {
        triggers {
          genericTrigger {
            genericVariables {
              genericVariable {
                key('push_repository')
                value('$.repository.full_name')
                expressionType('JSONPath')
                regexpFilter('')
                defaultValue('')
              }
              genericVariable {
                key('push_ref')
                value('$.ref')
                expressionType('JSONPath')
                regexpFilter('')
                defaultValue('')
              }
              genericVariable {
                key('push_after')
                value('$.after')
                expressionType('JSONPath')
                regexpFilter('')
                defaultValue('')
              }
              genericVariable {
                key('push_user')
                value('$.pusher.name')
                expressionType('JSONPath')
                regexpFilter('')
                defaultValue('')
              }
            }
            genericRequestVariables { }
            genericHeaderVariables {
              genericHeaderVariable {
                key('X-GitHub-Event')
                regexpFilter('')
              }
              genericHeaderVariable {
                key('X-GitHub-Delivery')
                regexpFilter('')
              }
            }
            causeString('$push_user pushed $push_after')
            tokenCredentialId('airloom-hook-token')
            printContributedVariables(false)
            printPostContent(false)
            regexpFilterText('$push_repository $x_github_event $push_ref $push_after')
            regexpFilterExpression('^' + name.replace('.', '\\.') + ' push refs/heads/main (?!0{40}$)[0-9a-f]{40}$')
          }
        }
      }
    }
    definition {
      cpsScm {
        scm {
          git {
            remote {
              url('http://git:8081/git/' + name + '.git')
              credentials('airloom-git')
            }
            branch('refs/heads/main')
          }
        }
        scriptPath('Jenkinsfile')
        lightweight(false)
      }
    }
  }
}
